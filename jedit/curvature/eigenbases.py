"""Eigendecompositions of factors: one matrix a call, after a look whether it is finite.

In jaxlib 0.10.2 on CPU several batched `eigh` in one jitted function can deadlock, and LAPACK may
never return on a matrix with a NaN; hence no batch, no jit, and the check in front.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from jedit.core.devices import fetched
from jedit.core.precision import HIGHEST
from jedit.curvature.checks import check_layers_finite
from jedit.curvature.factorization import Factorize
from jedit.curvature.sketch import Sketched, nystrom
from jedit.curvature.subspace import is_iterated, leading, with_rest
from jedit.curvature.types import Factor


class Moment(NamedTuple):
    """A factor A or G before its decomposition.

    Attributes:
        matrix: (layers, d, d), (layers, d) for a diagonal one, or a sketch.
        block: the name of the block that it belongs to, for error messages.
        hint: what to say when it is not finite.
    """

    matrix: Array | Sketched
    block: str
    hint: str


def factorize(
    matrix: Float[Array, "layers d d"] | Float[Array, "layers d"] | Sketched,
    name: str,
    *,
    dtype: DTypeLike | None = None,
    hint: str = "",
    how: Factorize = Factorize(),  # noqa: B008 - frozen and hashable
    start: Array | None = None,
) -> Factor:
    """Return every layer's matrix as a factor, with the eigenbasis that is asked for.

    Args:
        matrix: symmetric positive semi-definite, a diagonal, or a sketch of the first.
        name: the name of its block, for the error message.
        dtype: the dtype to decompose in; None: the matrix's own. What is iterated, to a 1,000th, or
            sketched is so in that in any case.
        hint: what to say when it is not finite.
        how: which eigenvectors are wanted; a diagonal factor needs none.
        start: eigenvectors to begin with, where the leading ones alone are wanted; None: random.

    Returns:
        The factor, in the matrix's dtype; eigenvalues that rounding made negative are zero.

    Raises:
        FloatingPointError: the matrix is not finite.
    """
    if isinstance(matrix, Sketched):
        for part in (matrix.image, matrix.trace):
            check_layers_finite(part, name, hint)
        assert how.rank is not None  # nothing else is sketched
        return nystrom(matrix, how.rank)
    check_layers_finite(matrix, name, hint)
    if matrix.ndim == 2:
        return Factor(matrix, None, matrix)
    if how.by in ("cholesky", "inverse"):
        return Factor(matrix, None, None, how.by)
    rank = kept_rank(how, matrix.shape[-1])
    if rank is not None and is_iterated(rank, matrix.shape[-1]):
        return leading(matrix, rank, start)
    # Waited for one by one: dispatched side by side, they are the batch that may deadlock.
    pairs = [jax.block_until_ready(eigenpairs(layer, dtype, rank)) for layer in matrix]
    values, bases = (jnp.stack(side) for side in zip(*pairs, strict=True))
    return Factor(matrix if rank is None else None, bases, values)


def kept_rank(how: Factorize, d: int) -> int | None:
    """Return how many leading eigenvectors are kept of a dense matrix of side d; None: all."""
    return how.rank if how.rank is not None and how.rank < d else None


def eigenpairs(
    matrix: Float[Array, "d d"], dtype: DTypeLike | None, rank: int | None
) -> tuple[Float[Array, " n"], Float[Array, "d k"]]:
    """Return a factor's eigenvalues and eigenvectors, in the matrix's dtype, of one layer.

    Args:
        matrix: symmetric and positive semi-definite, on one device.
        dtype: the dtype to decompose in; None: the matrix's own.
        rank: k, how many leading ones are kept, behind the mean of the other values; None: all.
    """
    pair = eigh(matrix, dtype or matrix.dtype)
    values, vectors = (jnp.asarray(x, matrix.dtype) for x in pair)
    if rank is not None:
        return with_rest(values, vectors, jnp.trace(matrix), rank)
    # A sum of outer products has no negative eigenvalue: those of rounding would make a power NaN.
    return jnp.maximum(values, 0), vectors


def eigh(
    matrix: Float[Array, "d d"], dtype: DTypeLike
) -> tuple[Float[ArrayLike, " d"], Float[ArrayLike, "d d"]]:
    """Return eigenvalues and eigenvectors.

    In a dtype that JAX has disabled NumPy computes them, on the host.
    """
    # float64 without x64: JAX would silently take float32.
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        return np.linalg.eigh(np.asarray(matrix, dtype))
    return jnp.linalg.eigh(matrix.astype(dtype))


def rotate_axis(basis: Array | None, x: Array, axis: int, *, back: bool = False) -> Array:
    """Multiply x by Qᵀ along an axis of (layers, d_in, d_out), or by Q, back; None: by nothing."""
    if basis is None:
        return x
    # Contracted as it lies: a transposed basis would be a copy of it.
    q = "lai" if back else "lia"
    spec = f"{q},lij->laj" if axis == 1 else f"{q},lji->lja"
    return jnp.einsum(spec, fetched(basis), x, precision=HIGHEST)


def shape_of(matrix: Array | Sketched, how: Factorize) -> Factor:
    """Return a factor of the shapes that `factorize` makes, under `jax.eval_shape`."""
    if isinstance(matrix, Sketched):
        assert how.rank is not None  # nothing else is sketched
        image = matrix.image
        return Factor(None, image[..., : how.rank], image[:, 0, : how.rank + 1])
    if matrix.ndim == 2:
        return Factor(matrix, None, matrix)
    if how.by in ("cholesky", "inverse"):
        return Factor(matrix, None, None, how.by)
    if (rank := kept_rank(how, matrix.shape[-1])) is not None:
        return Factor(None, matrix[..., :rank], matrix[:, 0, : rank + 1])
    return Factor(matrix, matrix, matrix[..., 0])
