"""MCU, minor component unlearning: forget where relearning does not look (arXiv 2605.11685).

    lower   L(z),   z = (I - Q Qᵀ) h                     `objective`, with a retain term `held`
    C v_i = c_i v_i,   c_1 >= c_2 >= ...                 C = M - μ μᵀ
    Q       orthonormal basis of μ, v_1 ... v_K          `rank`

    h       a forget token's output of a perceptron      `site`, the matrix that it leaves
    μ, M    mean and second moment of h before the edit: μ = E[a]ᵀ W, M = Wᵀ A W
    A       moment of what enters that matrix W          `moments`

Edits mostly move hidden states along the few directions in which these vary most, and a fine-tuned
model finds those first; what is moved in the others comes back last [paper, its abstract]. So the
mean and the top components are taken out of h before the loss sees it, and no gradient flows along
them. `jedit.metrics.recovery_by_component` measures what has come back, component by component.

Differences. That mean and top K components of the forget rows' outputs are projected out is as read
in notes [notes]; which loss is taken of the rest, K and the site were not known. Ours: any
objective of hidden states, RMU's by default, with the retain loss; K = 8; the outputs before their
bias. The moments come from a curvature, so that no pass is made for them: a site with a bias has
E[a] in its homogeneous coordinate. Without one the mean is not known, and Q are the top K + 1
eigenvectors of M itself, the first of which leans to μ [derived].
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind, nearest
from jedit.core.checks import COUNT, check_numbers
from jedit.core.devices import fetched, on_auto_axes
from jedit.core.precision import HIGHEST
from jedit.curvature import Curvature
from jedit.curvature.checks import check_counted, check_covers, check_layers_finite, matrix_of
from jedit.curvature.eigenbases import eigh
from jedit.curvature.types import Kronecker
from jedit.objectives import RMU, MinorPart, Objective, RetainNLL, with_retain
from jedit.objectives.hidden_states import Hidden
from jedit.tracing import Leaving
from jedit.training.method import TrainingMethod


def dominant_directions(
    A: Float[Array, "rows rows"], W: Float[Array, "d_in d_out"], K: int
) -> Float[np.ndarray, "d_out k"]:
    """Return Q of the header, of A with or without the homogeneous coordinate as its last."""
    d_in = len(W)
    A = A if A.ndim == 2 else jnp.diag(A)
    M = jnp.matmul(W.T, jnp.matmul(A[:d_in, :d_in], W, precision=HIGHEST), precision=HIGHEST)
    if len(A) == d_in:
        _, vectors = eigh(M, M.dtype)
        return np.asarray(vectors)[:, ::-1][:, : K + 1]
    mu = jnp.matmul(A[d_in, :d_in], W, precision=HIGHEST) / jnp.sqrt(A[d_in, d_in])
    _, vectors = eigh(M - jnp.outer(mu, mu), M.dtype)
    top = np.asarray(vectors, np.float64)[:, ::-1][:, :K]
    rest = np.asarray(mu, np.float64)
    size = np.linalg.norm(rest)
    for _ in range(2):  # once more, for what the first subtraction's rounding left
        rest = rest - top @ (top.T @ rest)
    length = np.linalg.norm(rest)
    # A mean within the components' span, or none, adds no direction.
    more = [rest[:, None] / length] if length > 1e-4 * size > 0 else []
    return np.concatenate([*more, top], axis=1).astype(M.dtype)


@on_auto_axes
def mcu(
    params: PyTree,
    moments: Curvature,
    optimizer: optax.GradientTransformation,
    *,
    site: str,
    rank: int = 8,
    objective: Callable[[Hidden], Objective] = RMU,
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make minor component unlearning, of any objective of hidden states.

        estimator = jedit.kfac(apply, Categorical(), select="mlp/down")
        moments = jedit.estimate(estimator, params, map(answers_only, batches(forget, 32)), key=key)
        method = mcu(params, moments, optax.adam(1e-4), site="blocks/1/mlp/down/kernel")

    Args:
        params: the parameters before the edit.
        moments: K-FAC of the forget rows, of a text at its answers' tokens alone; the factor A of
            the site is read.
        optimizer: any optax transform.
        site: path of the matrix whose outputs h are.
        rank: K, how many components are left alone beside the mean: 8 is arbitrary. At most the
            outputs' width less two, of which one is the mean's.
        objective: of a function that gives hidden states, the objective L; `RMU` at its steering,
            or `lambda hidden: RepresentationDeviation(hidden)`.
        held: the retain term, at weight 1; the retain loss.

    Returns:
        A method for `jedit.unlearn`.

    Raises:
        ValueError: the site has no dense moment of inputs, is a stack of matrices or used several
            times, or is too narrow for the rank, or its moment is centred and has a bias.
    """
    check_numbers(COUNT, rank=rank)
    check_kind(moments, Curvature, "moments", "as `estimate` returns it")
    block = moments.blocks.get(site)
    if not isinstance(block, Kronecker):
        known = [name for name, b in moments.blocks.items() if isinstance(b, Kronecker)]
        raise ValueError(
            f"{site!r} has no moment of inputs; of those that have, {nearest(site, known)}"
        )
    weight = block.weight
    if block.is_merged:
        raise ValueError(f"{site!r} is used at several sites, so its moment is of no one's outputs")
    if weight.layers > 1:
        raise ValueError(
            f"{site!r} is a stack of {weight.layers} matrices; MCU takes one by itself"
        )
    if rank > weight.d_out - 2:
        raise ValueError(
            f"rank must leave a direction of {site!r} beside the mean's, at most "
            f"{weight.d_out - 2} of {weight.d_out}; got {rank}"
        )
    check_counted(moments.num_outputs, "the curvature in moments")
    leaves = check_covers(moments, params)
    A = fetched(matrix_of(moments.factors[block.input], site))
    check_layers_finite(A, site)
    homogeneous = A[0, -1] if A.ndim == 2 else A[0, -1, -1]
    if A.shape[1] > weight.d_in and not homogeneous > 0:
        raise ValueError(
            f"the moment of {site!r} is centred, so that the outputs' mean is not in it; take it "
            "about zero, by kfac(..., centred=False)"
        )
    W = weight.kernel.gather({weight.path: leaves[weight.path].astype(A.dtype)})
    minor = MinorPart(Leaving(site), dominant_directions(A[0], W[0], rank))
    return TrainingMethod(with_retain(objective(minor), held), optimizer)
