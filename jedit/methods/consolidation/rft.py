"""RFT: to learn from a model's own answers, of which a filter keeps some (arXiv 2507.05386).

    draw   y_i1 .. y_iG ~ p(· | x_i),  R_ij their rewards
    keep   answers with R_ij >= τ, learnt by -mean NLL               `objective=None`
           or questions with max_j R_ij >= τ, all their answers,
           learnt by the policy gradient                            `objective=GRPO()`

    R, τ, G   `play`, `RftStages.threshold`, `Played.rewards`

Lai et al. find that reinforcement fine-tuning keeps more of what a model knew than supervised
fine-tuning on given answers does, and speed it up by rollout filtering (RIF-RFT): what no draw
answers cannot be learnt from draws.  Shenfeld et al. (2509.04259) and Chen et al. (2510.18874) put
it down to the answers being the model's own: among all ways to be right, it goes the one that is
nearest.

Differences.  That RIF-RFT keeps learnable questions only is the paper's abstract [paper]; that
"learnable" means one draw of G at τ or above, and τ = 0.5, is ours.  There the filter runs once
before training, ours at each draw, so that a question that the model comes to answer is let in.
Learning by NLL of the rewarded answers (rejection sampling, RFT by its other name) is what remains
of the policy gradient with rewards of 0 and 1 and no baseline.  Two updates a draw are arbitrary,
as RULE's here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree

from jedit.core.arguments import check_function, check_kind, check_optimizer, check_word
from jedit.core.batch import Batch
from jedit.core.checks import COUNT, FINITE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.edits import Edit, edit_between
from jedit.methods.trained._draws import Lesson, learn_from_draws
from jedit.objectives import GRPO, Answers, LearnNLL, Played, group_advantages
from jedit.objectives.token_nll import counted_nll
from jedit.training.method import TrainingMethod
from jedit.training.watch import LoopState

Keep = Literal["rewarded", "learnable"]


@dataclasses.dataclass(frozen=True)
class RftStages:
    """How long RFT lasts, and what is kept of a draw.

    Attributes:
        steps: draws of answers; 20 is arbitrary, RULE's number.
        updates: steps of the optimizer for one draw; 2 is arbitrary.
        threshold: τ, the reward from which an answer is right; 0.5 is arbitrary.
    """

    steps: int = 20
    updates: int = 2
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, steps=self.steps, updates=self.updates)
        check_numbers(FINITE, threshold=self.threshold)


class RftInfo(NamedTuple):
    """What was drawn and kept.

    Attributes:
        rewards: mean reward of each draw, before it is learnt from.
        kept: share of each draw's answers that the filter kept; a draw of which it kept none
            teaches nothing, and makes no update.
        loss: the loss of each update.
    """

    rewards: Float[np.ndarray, " steps"]
    kept: Float[np.ndarray, " steps"]
    loss: Float[np.ndarray, " updates"]


@on_auto_axes
def rft(
    apply: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    play: Callable[..., Played],
    optimizer: optax.GradientTransformation,
    *,
    key: Key[Array, ""],
    stages: RftStages = RftStages(),  # noqa: B008 - frozen and hashable
    objective: GRPO | None = None,
    look: Callable[[int, PyTree], Any] | None = None,
) -> tuple[Edit, RftInfo]:
    """Learn from answers that the model draws itself, as far as they are worth it.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the parameters to begin with, GRPO's reference.
        play: `(params, *, key) -> Played`: asks some questions, draws answers, judges them; as many
            of both each time, so that nothing is compiled twice.
        optimizer: learning rate included.
        key: the random key of the draws.
        stages: how long it lasts, and which reward is enough.
        objective: None: the NLL of the rewarded answers; or the policy gradient of all answers to
            learnable questions.
        look: told of the number of draws learnt from and the parameters there, 0 at first.

    Returns:
        The edit, and what was drawn and kept.

    Raises:
        TypeError: an argument is something else.
        ValueError: a number out of its range, or rewards that are no groups of the rows.
        FloatingPointError: a loss or a parameter is not finite.
    """
    check_function(play, "play", "(params, *, key)")
    check_optimizer(optimizer)
    check_kind(stages, RftStages, "stages", "such as RftStages(steps=20)")
    if objective is not None:
        check_kind(objective, GRPO, "objective", "or None for the rewarded answers' NLL")
    keep: Keep = "rewarded" if objective is None else "learnable"
    taught = functools.partial(_taught, apply, stages.threshold, keep)
    play_key, order_key = (jax.random.fold_in(key, i) for i in range(2))
    method = TrainingMethod(LearnNLL() if objective is None else objective, optimizer)
    lesson = Lesson(play, taught, method, stages.updates, lambda p: p, look)
    state, played, histories = learn_from_draws(
        lesson,
        apply,
        LoopState(0, params, None, params),
        draws=stages.steps,
        play_key=play_key,
        order_key=order_key,
    )
    kept = [
        np.mean(filter_rollouts(drawn.rewards, threshold=stages.threshold, keep=keep))
        for drawn in played
    ]
    losses = [np.asarray(history["loss"]) for history in histories]
    info = RftInfo(
        np.asarray([float(np.mean(drawn.rewards)) for drawn in played]),
        np.asarray(kept, np.float64),
        np.concatenate(losses) if losses else np.zeros(0),
    )
    return edit_between(params, state.params), info


def filter_rollouts(
    rewards: Float[Array | np.ndarray, "questions group"],
    *,
    threshold: float = 0.5,
    keep: Keep = "rewarded",
) -> Bool[np.ndarray, "questions group"]:
    """Say which answers are learnt from.

    Args:
        rewards: by question, one for each of its answers.
        threshold: τ, the reward from which an answer is right; 0.5 is arbitrary.
        keep: "rewarded" answers alone; or all those to "learnable" questions, of which one answer
            at least is right.

    Raises:
        ValueError: there are no groups, a reward is not finite, or another word.
    """
    check_numbers(FINITE, threshold=threshold)
    check_word(Keep, keep=keep)
    rewards = np.asarray(rewards)
    if rewards.ndim != 2 or 0 in rewards.shape:
        raise ValueError(f"rewards must be (questions, answers to each), got {rewards.shape}")
    check_numbers(FINITE, rewards=rewards)
    is_right = rewards >= threshold
    if keep == "rewarded":
        return is_right
    return np.broadcast_to(is_right.any(axis=1, keepdims=True), rewards.shape)


def _taught(
    apply: Callable, threshold: float, keep: Keep, params: PyTree, drawn: Played
) -> Batch | Answers | None:
    """Return the rows with nothing counted of what is filtered out: their number stays.

    Raises:
        ValueError: the rewards are not those of the rows.
    """
    kept = filter_rollouts(drawn.rewards, threshold=threshold, keep=keep).reshape(-1)
    count = len(jax.tree.leaves(drawn.rows)[0])
    if len(kept) != count:
        raise ValueError(
            f"play gave {count} rows and rewards of shape {np.shape(drawn.rewards)}; give one "
            "reward for each row"
        )
    if not kept.any():
        return None
    rows = drawn.rows
    mask = rows.mask
    if mask is None:
        assert rows.targets is not None  # what was drawn is a batch of tokens
        mask = jnp.ones(jnp.shape(rows.targets), jnp.float32)
    mask = jnp.asarray(mask)
    here = jnp.asarray(kept).reshape(-1, *(1,) * (mask.ndim - 1))
    rows = rows._replace(mask=mask * here.astype(mask.dtype))
    if keep == "rewarded":
        return rows
    return Answers(rows, _nll(apply, params, rows), group_advantages(drawn.rewards).reshape(-1))


@functools.partial(jax.jit, static_argnums=0)
def _nll(apply: Callable, params: PyTree, rows: Batch) -> Array:
    return counted_nll(apply, params, rows)[0]
