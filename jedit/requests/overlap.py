"""How much the edits of several requests overlap, and weights with which nothing counts twice.

Requests that overlap count what they share twice when their edits are added. Their Gram matrix in
the damped metric, K_rs = Δ_rᵀ (F + λ) Δ_s = α_r g_rᵀ Δ_s, says by how much; `balanced` solves

    Σ_s K_rs c_s = K_rr      for all r

so that Σ_s c_s Δ_s raises each request's loss by what its own edit would, to first order [derived].
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.precision import HIGHEST
from jedit.curvature import Curvature, Diagonal, Kronecker, eigenvalues, factored, rotate
from jedit.curvature.algebra import is_undecomposed
from jedit.curvature.checks import check_decomposed, check_has_matrices, eigenbasis_of
from jedit.edits import Edit, dense


@on_auto_axes
def interactions(
    curvature: Curvature, edits: Edit, *, damping: float = 0.0, exact: bool = False
) -> Float[Array, "requests requests"]:
    """Return the Gram matrix K_rs = Δ_rᵀ (F + λ) Δ_s of a stack of edits.

    Without damping, ½ cᵀKc predicts the retain KL of `sum_edits(edits, c)`; with that of
    `batch_unlearn` it is what `balanced` wants. Holds R matrices of the largest parameter, and of a
    curvature without eigenvectors twice as many.

    Args:
        curvature: the curvature that the edits were made with.
        edits: a stack of R edits.
        damping: λ over each block's mean eigenvalue; 0.0, none.
        exact: whether the products of eigenvalues are damped, as by the `Solver` that made the
            edits; False there too. True needs all eigenvectors, and False the factors' matrices.

    Returns:
        K, (R, R).

    Raises:
        ValueError: a negative damping; or the curvature has not what is needed of it, such as one
            with leading eigenvectors alone.
    """
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_decomposed(curvature) if exact else check_has_matrices(curvature)
    return _interactions(curvature, edits, jnp.asarray(damping, float), exact=exact)


@on_auto_axes
def balanced(gram: Float[Array, "requests requests"], *, ridge: float = 1e-6) -> Array:
    """Return weights c of `sum_edits` with which no overlap is counted twice.

    Args:
        gram: K, from `interactions` with the edits' own damping.
        ridge: added to K's diagonal, over its mean, 1e-6 (arbitrary); requests that are
            equal share one edit then.

    Returns:
        c, (R,); 1 for a request that overlaps with no other.
    """
    check_numbers(NOT_NEGATIVE, ridge=ridge)
    # Edits of very unlike sizes are brought to one before the ridge is added, which is in units of
    # the mean.
    scale = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(scale > 0, scale, 1)
    unit = gram / scale[:, None] / scale[None]
    unit = unit + ridge * jnp.eye(len(gram), dtype=gram.dtype)
    # K c = diag(K) with c = c'/scale and K = scale unit scale: unit c' = scale.
    return jnp.linalg.solve(unit, scale) / scale


@functools.partial(jax.jit, static_argnames="exact")
def _interactions(curvature: Curvature, edits: Edit, damping: Array, *, exact: bool) -> Array:
    num_requests = jax.tree.leaves(edits)[0].shape[0]
    gram = jnp.zeros((num_requests, num_requests))
    for name, block in curvature.blocks.items():
        if is_undecomposed(block, curvature):
            gram = gram + _of_factors(curvature, block, edits, damping).astype(gram.dtype)
            continue
        values = eigenvalues(curvature, name)
        if isinstance(block, Kronecker) and not exact:
            ends = [
                eigenbasis_of(curvature.factors[f], name)[1] for f in (block.input, block.output)
            ]
            # The same two dampings that made the edits; another λ and K_rr would not be their gain.
            a, g = (
                e + jnp.sqrt(damping).astype(values.dtype) * jnp.mean(e, 1, keepdims=True)
                for e in ends
            )
            weights = a[:, :, None] * g[:, None, :]
        else:
            mean = jnp.mean(values, axis=(1, 2), keepdims=True)
            weights = values + damping.astype(values.dtype) * mean

        def whitened(one: Edit, name=name, block=block, weights=weights) -> Array:
            matrix = _matrix(block, one).astype(weights.dtype)
            # With the root of the metric on each edit K is one matrix product, symmetric by itself.
            return (jnp.sqrt(weights) * rotate(curvature, name, matrix)).reshape(-1)

        rows = jax.lax.map(whitened, edits, batch_size=min(16, num_requests))
        part = jnp.einsum("ri,si->rs", rows, rows, precision=HIGHEST)
        gram = gram + part.astype(gram.dtype)
    return gram


def _matrix(block: Kronecker | Diagonal, edit: Edit) -> Array:
    leaves = {path: dense(edit.blocks[path]) for path in block.weight.paths}
    return block.weight.gather(leaves)


def _of_factors(curvature: Curvature, block: Kronecker, edits: Edit, damping: Array) -> Array:
    """Return a block's part of K, without eigenvectors: Δ_r times (A + λ_A) Δ_s (G + λ_G)."""
    pair = factored.damped_pair(curvature, block, damping, absolute=False)
    dtype = pair[0].values.dtype

    # A root of the metric would need it to be positive, which it need not be without damping.
    def moved(one: Edit) -> tuple[Array, Array]:
        matrix = _matrix(block, one).astype(dtype)
        return matrix.reshape(-1), factored.multiplied(pair, matrix, block.sharding).reshape(-1)

    num_requests = jax.tree.leaves(edits)[0].shape[0]
    rows, images = jax.lax.map(moved, edits, batch_size=min(16, num_requests))
    part = jnp.einsum("ri,si->rs", rows, images, precision=HIGHEST)
    return (part + part.T) / 2  # rounding alone parts the two
