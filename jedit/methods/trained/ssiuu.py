"""Ssiuu: forget, and let nothing new hold the answers down (Yang et al., arXiv 2509.22263).

    minimise L_u(θ_t) + λ Σ_{i in I-} Σ_{(x,y)} |A_i(θ_{t-1}) - A_i(θ_t)|,   I- = {i : A_i(θ_t) < 0}

    L_u      the forget objective                              `objective`
    A_i      attribution, θ_i ∂P(y|x)/∂θ_i                     `objectives.attribution`, `score`
    θ_{t-1}  the parameters a step before                      the optimizer's state
    λ        strength                                          `strength`

An answer can become unlikely because what held it up is gone, or because something now holds it
down, which a little training on anything takes away again.  The penalty holds still the units that
hold it down.  I- and A(θ_{t-1}) are constants of the gradient [paper].

Differences.  The equation and that units are single parameters are the paper's [notes]; no code was
there to be read.  Units are the parameters that are trained, those of adapters where only they are
[ours].  I- is taken row by row, and the sum over the rows of a step is the mean over those that
count anything, so that λ does not depend on how many there are.  P is the geometric mean over an
answer's tokens.  The first step has none before it, and no penalty: two roundings of one number
would decide its sign; for that reason bfloat16 parameters, between two of which there is little but
rounding, are better trained as float32 masters.  L_u is gradient difference by default, and λ =
0.01: both ours, as the notes name neither; so is the order of things in a step: the penalty is of
the rows that the step draws, at both parameters.  The loss in the history is L_u alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.core.outputs import by_example, counted_outputs
from jedit.core.precision import total, wide_dtype
from jedit.objectives import GA, Objective, with_retain
from jedit.objectives.attribution import Score, attributed, row_score
from jedit.training.method import TrainingMethod


def ssiuu(
    optimizer: optax.GradientTransformation,
    *,
    strength: float = 0.01,
    objective: Objective = with_retain(GA()),  # noqa: B008 - frozen and hashable
    score: Score = "probability",
) -> TrainingMethod:
    """Make Ssiuu of any forget objective, around any optimizer.

        method = ssiuu(optax.adam(1e-5), objective=with_retain(NPO()))
        params, history = jedit.unlearn(method, apply, params, forget, retain, steps=100, key=key)

    Args:
        optimizer: the optimizer, which takes the penalised gradient.
        strength: λ, per row; 0.01 (ours): of 1e-3 to 10, the one that held relearning down on
            our GPT of 0.4 million parameters; at 0.1 and more, 200 steps did not forget. At 0 the
            method is its objective.
        objective: L_u, with its retain term; gradient difference by default (ours).
        score: "probability", the paper's, or "log_probability", whose attributions do not vanish
            with the answer.

    Returns:
        A method for `jedit.unlearn`; the forget set must be one `Batch`. A step costs beside the
        objective's gradient two gradients and one of second order of every forget row, one row at a
        time, and its state holds the parameters once more.

    Raises:
        ValueError: a strength that is negative or not finite, or an unknown score.
    """
    check_numbers(NOT_NEGATIVE, strength=strength)
    if score not in ("probability", "log_probability"):
        raise ValueError(f"score must be 'probability' or 'log_probability', got {score!r}")
    if strength == 0:
        return TrainingMethod(objective, optimizer)
    chain = optax.chain(_add_lagged_gradient(strength), optimizer)
    return TrainingMethod(objective, chain, _Scores(score))


def penalty(
    score_fn: Callable[[PyTree], Float[Array, ""]], previous: PyTree, params: PyTree
) -> Float[Array, ""]:
    """Return Σ_{i in I-} |A_i(θ_{t-1}) - A_i(θ_t)| of one row, to be differentiated in params."""

    def attributions(params: PyTree) -> PyTree:
        return attributed(lambda params: (score_fn(params), None), params)[0]

    A_before, A = lax.stop_gradient(attributions(previous)), attributions(params)
    terms = jax.tree.map(
        lambda a, b: jnp.sum(jnp.where(lax.stop_gradient(a) < 0, jnp.abs(b - a), 0)), A, A_before
    )
    return total(terms)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """The arguments of the transform: the rows of a step, and the score of one at any params."""

    score: Score

    def __call__(
        self, apply: Callable, params: PyTree, forget: Any, retain: PyTree, reference: PyTree
    ) -> dict[str, Any]:
        del params, retain, reference
        check_batch(forget, "forget")

        def row_score_fn(params: PyTree, row: Batch) -> Float[Array, ""]:
            return row_score(self.score, apply, params, row)[0]

        return {"row_score_fn": row_score_fn, "rows": jax.tree.map(jnp.asarray, forget)}


class LaggedGradientState(NamedTuple):
    """The state of the penalty.

    Attributes:
        previous: θ_{t-1}, the parameters that the last update was made at.
        count: the number of updates made, int32.
    """

    previous: PyTree
    count: Array


def _add_lagged_gradient(strength: float) -> optax.GradientTransformationExtraArgs:
    """Add λ times the penalty's gradient, a row at a time, from the second step on."""

    def init(params: PyTree) -> Any:
        return LaggedGradientState(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, row_score_fn=None, rows=None, **extra_args) -> Any:
        del extra_args
        if params is None or row_score_fn is None or rows is None:
            raise ValueError("ssiuu needs params and the extra arguments row_score_fn and rows")

        def add(sums: PyTree, row: Batch) -> tuple[PyTree, None]:
            def value(params: PyTree) -> Array:
                return penalty(lambda p: row_score_fn(p, row), state.previous, params)

            gradient = jax.grad(value)(params)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, gradient), None

        def penalised() -> PyTree:
            counted = by_example(rows, counted_outputs(rows, rows.targets.shape))
            number = jnp.maximum(jnp.sum(jnp.any(counted, axis=1)), 1)
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide_dtype(p.dtype)), params)
            sums, _ = lax.scan(add, zeros, rows)
            return jax.tree.map(
                lambda u, s: u + (strength * s / number.astype(s.dtype)).astype(u.dtype),
                updates,
                sums,
            )

        added = lax.cond(state.count > 0, penalised, lambda: updates)
        return added, LaggedGradientState(params, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)
