"""RULE: a boundary of refusal, by reinforcement (Zhang et al., arXiv 2506.07171).

    1. rejection tuning    lower the NLL of refusals to forget questions and of the answers to
                           boundary questions
    2. GRPO                per step, G answers to each question are drawn, judged, and
                           -E min(ρ A, clip(ρ) A) + β KL(p || p_ref) is lowered

    12% of the forget set, 8% boundary questions     `Dialogue.refusals`, `Dialogue.boundary`
    reward R                                         within `Dialogue.play`; a language model's is
                                                     `refusal_rewards`, `answer_rewards`
    G = 8 answers, 20 steps, rate 2e-6               `Dialogue.play`, `RuleStages.steps`,
                                                     `Dialogue.rate`
    β = 1e-2                                         `jedit.objectives.GRPO`
    p_ref                                            the model after stage 1

What draws and judges answers is a callable, so that a model's texts and their rewards stay on the
host; the steps between two draws are one compiled call of `jedit.unlearn`.

Differences.  The two stages and both shares are the paper's [paper]; G, steps, rate, β and the
reward are those of the released code [code].  How long the first stage lasts and at what rate is
not stated in what we have: 40 steps at 1e-5 are arbitrary, as is that each draw serves two updates,
so that the clipping has something to clip.  There the boundary questions are written by a language
model beside the forget questions; ours are retain rows that the caller gives, neighbours where
there are any.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from jedit.core.arguments import check_function, check_kind
from jedit.core.batch import Batch
from jedit.core.checks import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.edits import Edit, edit_between
from jedit.methods.trained._draws import Lesson, learn_from_draws
from jedit.objectives import GRPO, Answers, Dialogue, Played, RetainNLL, group_advantages
from jedit.objectives.token_nll import counted_nll
from jedit.training.freezing import which_are_trained
from jedit.training.loop import unlearn
from jedit.training.masters import with_masters
from jedit.training.method import TrainingMethod
from jedit.training.watch import LoopState


@dataclasses.dataclass(frozen=True)
class RuleStages:
    """How long the two stages of RULE last.

    Attributes:
        tuning_steps: steps of rejection tuning; 40 is arbitrary.
        steps: draws of answers, each learnt from; 20, the code's. 0: rejection tuning alone.
        updates: steps of the optimizer for one draw; 2 is arbitrary.
        batch_size: rows in a step of the first stage; 16 is arbitrary.
    """

    tuning_steps: int = 40
    steps: int = 20
    updates: int = 2
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT_OR_ZERO, tuning_steps=self.tuning_steps, steps=self.steps)
        check_numbers(COUNT, updates=self.updates, batch_size=self.batch_size)


class RuleInfo(NamedTuple):
    """What the stages did.

    Attributes:
        tuning_loss: mean NLL of the first stage's rows, a step each.
        rewards: mean reward of each draw, before it is learnt from.
        reference_kl: estimated KL to the model after the first stage, at each update; after the
            first update of a draw its answers are those of a slightly earlier model.
    """

    tuning_loss: Float[np.ndarray, " tuning_steps"]
    rewards: Float[np.ndarray, " steps"]
    reference_kl: Float[np.ndarray, " updates"]


@on_auto_axes
def rule(
    apply: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    dialogue: Dialogue,
    *,
    key: Key[Array, ""],
    stages: RuleStages = RuleStages(),  # noqa: B008 - frozen and hashable
    objective: GRPO = GRPO(),  # noqa: B008 - frozen and hashable
    trainable: str | None = None,
    look: Callable[[int, PyTree], Any] | None = None,
) -> tuple[Edit, RuleInfo]:
    """Teach a model where to refuse: rejection tuning, then GRPO.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the trained parameters.
        dialogue: what it is taught by, and what draws and judges answers.
        key: the random key of the rows' orders and of the draws.
        stages: how long both stages last.
        objective: GRPO's clipping and KL.
        trainable: regular expression; a parameter in whose path it is not found stays. None: all
            are trained. Those that are narrower than float32 are kept in float32 meanwhile, in
            which steps of so small a rate add up.
        look: told of the number of draws learnt from, 0 after the first stage, and the parameters
            there, until the call ends.

    Returns:
        The edit, and what the stages did.

    Raises:
        TypeError: an argument is something else.
        ValueError: a number out of its range, refusals and boundary of two widths or kinds, or
            rewards that are no groups of the rows.
        FloatingPointError: a loss or a parameter is not finite.
    """
    check_kind(dialogue, Dialogue, "dialogue", "what RULE is taught by, and asked")
    check_kind(stages, RuleStages, "stages", "such as RuleStages(steps=20)")
    check_function(dialogue.play, "play", "(params, *, key)")
    check_numbers(NOT_NEGATIVE, tuning_rate=dialogue.tuning_rate, rate=dialogue.rate)
    tuning_key, play_key, order_key = (jax.random.fold_in(key, i) for i in range(3))
    taught = _together(dialogue.refusals, dialogue.boundary)
    dtypes = jax.tree.map(jnp.result_type, params)
    apply, params = with_masters(apply, params, which_are_trained(params, trainable))

    def told(params: PyTree) -> PyTree:
        return jax.tree.map(lambda p, dtype: jnp.asarray(p, dtype), params, dtypes)

    tuning = TrainingMethod(
        RetainNLL(),
        _adam(dialogue.tuning_rate),
        trainable=trainable,
        batch_size=stages.batch_size,
    )
    tuned, history = unlearn(
        tuning, apply, params, None, taught, steps=stages.tuning_steps, key=tuning_key
    )
    lesson = Lesson(
        dialogue.play,
        functools.partial(_answers, apply),
        TrainingMethod(objective, _adam(dialogue.rate), trainable=trainable),
        stages.updates,
        told,
        look,
    )
    state, played, histories = learn_from_draws(
        lesson,
        apply,
        LoopState(0, tuned, None, tuned),
        draws=stages.steps,
        play_key=play_key,
        order_key=order_key,
    )
    divergences = [np.asarray(learnt["reference_kl"]) for learnt in histories]
    info = RuleInfo(
        np.asarray(history["loss"]),
        np.asarray([float(np.mean(drawn.rewards)) for drawn in played]),
        np.concatenate(divergences) if divergences else np.zeros(0),
    )
    return edit_between(params, state.params, trainable), info


def _together(refusals: Batch, boundary: Batch) -> Batch:
    """Return the rows of both.

    Raises:
        ValueError: they have other fields or widths.
    """

    def kind(rows: Batch) -> tuple[Any, list[tuple[int, ...]]]:
        leaves, structure = jax.tree.flatten(rows)
        return structure, [jnp.shape(leaf)[1:] for leaf in leaves]

    if kind(refusals) != kind(boundary):
        raise ValueError(
            f"refusals and boundary are learnt in one batch, and have rows of shapes "
            f"{kind(refusals)[1]} and {kind(boundary)[1]}; encode them to one width, both with a "
            "mask or both without"
        )
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), refusals, boundary)


def _answers(apply: Callable, params: PyTree, drawn: Played) -> Answers:
    advantages = group_advantages(drawn.rewards).reshape(-1)
    count = len(jax.tree.leaves(drawn.rows)[0])
    if len(advantages) != count:
        raise ValueError(
            f"play gave {count} rows and rewards of shape {np.shape(drawn.rewards)}; give one "
            "reward for each row"
        )
    return Answers(drawn.rows, _nll(apply, params, drawn.rows), advantages)


@functools.partial(jax.jit, static_argnums=0)
def _nll(apply: Callable, params: PyTree, rows: Batch) -> Array:
    return counted_nll(apply, params, rows)[0]


@functools.cache
def _adam(learning_rate: float) -> optax.GradientTransformation:
    """One optimizer for each rate, which programs are compared by."""
    return optax.adam(learning_rate)
