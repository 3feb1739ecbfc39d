"""GRPO, group relative policy optimisation (Shao et al., DeepSeekMath, arXiv 2402.03300).

    A_i  = (R_i - mean R) / (std R + δ)                over the G answers to one question
    ρ_t  = p(o_t) / p_old(o_t)                         o_t: token t of answer i
    D_t  = p_ref(o_t) / p(o_t) - log(p_ref(o_t) / p(o_t)) - 1
    loss = -E_i (1/|o_i|) Σ_t [ min(ρ_t A_i, clip(ρ_t, 1 - ε, 1 + ε) A_i) - β D_t ]

    R_i      reward of answer i, a text's or any other          `group_advantages`
    p_old    the model that the answer was drawn from            `Answers.nll`
    p_ref    the model before                                    `reference`
    ε, β     `clip`, `kl_weight`

Right after the draw ρ is 1 and the gradient is the policy gradient -E A ∇log p of a mean over
tokens; D is not negative.  Its mean over the tokens of answers that p draws is the mean KL of a
token, KL(p || p_ref); as each answer's mean comes first, it is exactly that where all answers are
of one length, and at a later update of the same draw the answers are p_old's.

Differences.  The equations are the paper's [paper]; ε = 0.2 is what its followers clip at, and
std with one degree of freedom fewer and δ = 1e-6 are how they are usually programmed [derived].
β = 0.01 is RULE's [code].  The mean is over answers, each the mean of its tokens, as in the paper;
some frameworks take one mean over all tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import FINITE, NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.core.outputs import by_example
from jedit.objectives.objective import Value, needed
from jedit.objectives.token_nll import counted_nll, masked_mean

DELTA = 1e-6


class Answers(NamedTuple):
    """Answers that a model has drawn, and how much better than their group each one is.

    Attributes:
        rows: questions with the answers; what counts are the answers' tokens.
        nll: each token's negative log-likelihood under the model that drew it, as `counted_nll`
            gives it, in the outputs' leading shape.
        advantages: (n,), one for each answer; `group_advantages` makes them of rewards.
    """

    rows: Batch
    nll: Array
    advantages: Float[Array, " n"]


def group_advantages(rewards: Float[Array | np.ndarray, "questions group"]) -> Array:
    """Return each answer's advantage over the others to its question.

    Args:
        rewards: by question, one for each of its answers.

    Returns:
        Rewards less their group's mean, over its standard deviation; 0 where all are equal.

    Raises:
        ValueError: there are no groups, or a reward is not finite.
    """
    rewards = jnp.asarray(rewards)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (questions, answers to each), two answers or more; got "
            f"{rewards.shape}: a lone answer is no better than its group"
        )
    check_numbers(FINITE, rewards=rewards)
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    return centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + DELTA)


@dataclasses.dataclass(frozen=True)
class GRPO:
    """The clipped policy gradient of drawn answers, with a KL to the reference.

    Attributes:
        clip: ε, how far a token's ratio may move before its gradient stops; 0.2 (arbitrary;
            usual).
        kl_weight: β, the weight of the KL to the reference; 0.01, RULE's.
    """

    clip: float = 0.2
    kl_weight: float = 0.01

    def __post_init__(self) -> None:
        check_numbers(POSITIVE, clip=self.clip)
        check_numbers(NOT_NEGATIVE, kl_weight=self.kl_weight)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Answers,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss of the answers, which costs one more forward pass, of the reference."""
        del retain  # its questions are among the answered ones
        reference = needed(reference, self)
        rows = forget.rows
        nll, counted = counted_nll(apply, params, rows)
        fixed = jax.lax.stop_gradient(reference)
        before = counted_nll(apply, fixed, rows)[0].astype(nll.dtype)
        drawn = jnp.where(counted, forget.nll.astype(nll.dtype), 0)
        ratio = by_example(rows, jnp.exp(drawn - nll))
        advantage = forget.advantages.astype(nll.dtype)[:, None]
        held = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        gain = jnp.minimum(ratio * advantage, held * advantage)
        log_ratio = by_example(rows, nll - before)  # log(p_ref / p)
        divergence = jnp.expm1(log_ratio) - log_ratio
        is_token = by_example(rows, counted)
        length = jnp.sum(is_token, axis=1)

        def mean(values: Array) -> Array:
            each = jnp.sum(jnp.where(is_token, values, 0), axis=1)
            return masked_mean(each / jnp.maximum(length, 1).astype(each.dtype), length > 0)

        kl = mean(divergence)
        return -mean(gain) + self.kl_weight * kl, {
            "reference_kl": kl,
            "clipped": mean((held != ratio).astype(nll.dtype)),
        }
