"""Attribution of an answer to the parameters: how much each of them speaks for it, or against it.

    A_i(x, y) = θ_i ∂s(y|x)/∂θ_i        s = P(y|x), or log P(y|x)

One row's P is the geometric mean over its tokens that count, exp(-mean NLL): a number from 0 to 1
whatever the answer's length.  To first order s moves by ε A_i where θ_i grows by its share ε, so a
unit of positive attribution holds the answer up, and one of negative attribution holds it down.
For one row the two scores have the same attributions but for the factor P: A[P] = P A[log P].
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.outputs import by_example
from jedit.core.precision import wide
from jedit.objectives.token_nll import counted_nll, masked_mean

Score = Literal["probability", "log_probability"]


def row_score(
    score: Score, apply: Apply, params: PyTree, row: Batch
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the score of a row, and how many of its outputs count; of none it is 1, or log 1.

    Args:
        score: which of the two.
        apply: `apply(params, inputs) -> logits`.
        params: the parameters.
        row: a batch's arrays at one row, without their first axis.

    Raises:
        ValueError: an unknown score, or a packed batch.
    """
    if score not in ("probability", "log_probability"):
        raise ValueError(f"score must be 'probability' or 'log_probability', got {score!r}")
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], row)
    nll, counted = (by_example(one, x) for x in counted_nll(apply, params, one))
    loss = masked_mean(nll, counted)
    return jnp.exp(-loss) if score == "probability" else -loss, jnp.sum(counted)


def row_attribution(
    score: Score, apply: Apply, params: PyTree, row: Batch
) -> tuple[PyTree, Int[Array, ""]]:
    """Return A of every parameter, like params but in float32 or wider, and what counts of the row.

    It costs a gradient, and can be differentiated again.
    """
    return attributed(lambda params: row_score(score, apply, params, row), params)


def attributed(
    score_fn: Callable[[PyTree], tuple[Float[Array, ""], Any]], params: PyTree
) -> tuple[PyTree, Any]:
    """Return θ ∂s/∂θ of every parameter, in float32 or wider, and what the score has beside it."""
    gradient, beside = jax.grad(score_fn, has_aux=True)(params)
    return jax.tree.map(lambda p, g: wide(p) * wide(g), params, gradient), beside
