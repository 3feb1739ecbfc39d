"""Leading eigenvectors of a moment by orthogonal iteration, without a dense decomposition.

    Y = A Q,   H = Qᵀ Y = U diag(a) Uᵀ,   Q <- qr(Y)          Q (d, m), m = 2k + 8 columns

until the leading k of the Ritz values a stand still; then Q U has the eigenvectors. A step costs
2 d² m + 4 d m² flops, most of them one product. The error of the i-th value falls by
(a_{m+1} / a_i)² a step, which is why m is larger than k. Twice k, as a sketch of one pass needs
(Tropp et al. 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming
data": 2k + 1); 8 more for the smallest k (arbitrary).

The first Q is drawn from a fixed key: one curvature of one set of data has to be the same in every
call, in every process of a mesh, and after it was taken up again. Where an earlier curvature's
basis is given, Q starts there.

On a mesh the products are made where the matrix lies; what has m columns only is decomposed on one
device of each process, since CPUs that are devices of one process may not call LAPACK side by side.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jedit.core.devices import no_mesh, sharding_of
from jedit.core.precision import HIGHEST
from jedit.curvature.mesh.placement import devices_of, even, from_owner, whole
from jedit.curvature.types import Factor

# A Ritz value stands still when it changes by less than this times itself, or the mean eigenvalue
# where that is larger: a damped solve hardly sees what is below it. Arbitrary; the values' error is
# the square of the vectors'.
TOLERANCE = 1e-3
MAX_STEPS = 30  # arbitrary


def num_columns(rank: int) -> int:
    """Return m, how many columns are iterated, or sketched, for k eigenvectors."""
    return 2 * rank + 8


def is_iterated(rank: int, d: int) -> bool:
    """Say whether k eigenvectors of a matrix are iterated: where that is cheaper than finding all.

    It is not where the columns are half as many as the matrix has.
    """
    return 2 * num_columns(rank) < d


def leading(
    matrix: Float[Array, "layers d d"],
    rank: int,
    start: Float[Array, "layers d _"] | None = None,
) -> Factor:
    """Return the factor of a matrix's leading eigenvectors, and the mean of its other eigenvalues.

    Args:
        matrix: symmetric, positive semi-definite and finite; on a mesh the basis lies as its rows.
        rank: k, for which the columns are fewer than half of d (`is_iterated`).
        start: eigenvectors of a similar matrix, ascending, of any number; None: none are known.

    Returns:
        The factor. A warning says where values had not come to rest.
    """
    found = []
    for layer in range(len(matrix)):
        # Compiled, since several processes cannot slice what they share in another way.
        number = jnp.int32(layer)
        first = None if start is None else _layer(start, number)
        found.append(_leading_of(_layer(matrix, number), rank, first))
    return as_factor(found, sharding_of(matrix))


def _leading_of(
    matrix: Float[Array, "d d"], rank: int, start: Float[Array, "d _"] | None
) -> tuple[Array, Array]:
    """Return (1 + k eigenvalues, the mean of the others first; k eigenvectors), on one device."""
    d, dtype, place = len(matrix), matrix.dtype, sharding_of(matrix)
    mean = on_one_device(jnp.trace(matrix)) / d
    start = None if start is None else on_one_device(start)
    with no_mesh():
        q = _orthonormal(starting_columns(d, num_columns(rank), dtype, start))
        before = jnp.full((rank,), jnp.inf, dtype)
    for step in range(MAX_STEPS):
        y = on_one_device(_product(matrix, on_all_devices(q, place), place))
        with no_mesh():
            values, vectors = jax.block_until_ready(jnp.linalg.eigh(_symmetric_product(q, y)))
            scale = jnp.maximum(values[-rank:], mean)
            is_still = jnp.all(jnp.abs(values[-rank:] - before) <= TOLERANCE * scale)
        is_still = _is_agreed(is_still, place)
        if is_still or step == MAX_STEPS - 1:
            if not is_still:
                warnings.warn(
                    f"the {rank} leading eigenvalues of a factor of {d} columns still change "
                    f"by more than a {1 / TOLERANCE:.0f}th after {MAX_STEPS} steps, and are "
                    'taken as they are: a smaller rank or factorize="eigh" has no such error',
                    stacklevel=2,
                )
            break
        with no_mesh():
            q, before = _orthonormal(y), values[-rank:]
    with no_mesh():
        return with_rest(values, jnp.matmul(q, vectors, precision=HIGHEST), mean * d, rank)


def with_rest(
    values: Float[Array, " m"], vectors: Float[Array, "d m"], trace: Array, rank: int
) -> tuple[Float[Array, " k1"], Float[Array, "d k"]]:
    """Cut eigenvalues, ascending, to the leading ones, and put the mean of all others first."""
    values, rest = jnp.maximum(values[-rank:], 0), len(vectors) - rank
    mean = jnp.maximum(trace - jnp.sum(values), 0) / rest
    return jnp.concatenate([mean[None], values]), vectors[:, -rank:]


def as_factor(layers: list[tuple[Array, Array]], place: NamedSharding | None) -> Factor:
    """Return the factor of every layer's eigenvalues and eigenvectors, laid on the mesh by rows."""
    with no_mesh():
        values, bases = (jnp.stack(side) for side in zip(*layers, strict=True))
    if place is None:
        return Factor(None, bases, values)
    split = even(place, bases.shape, 0, 1, None)
    return Factor(None, on_all_devices(bases, split), on_all_devices(values, whole(place)))


def starting_columns(
    d: int, number: int, dtype: DTypeLike, start: Float[Array, "*layers d _"] | None
) -> Float[Array, "*layers d m"]:
    """Return columns to begin with: the last of `start`, and random ones of the same length."""
    random = jax.random.normal(jax.random.key(0), (d, number), dtype) / np.sqrt(d).astype(dtype)
    if start is None:
        return random
    known = start[..., -number:].astype(dtype)
    rest = random[:, known.shape[-1] :]
    rest = jnp.broadcast_to(rest, (*known.shape[:-2], *rest.shape))
    return jnp.concatenate([rest, known], axis=-1)


def on_one_device(x: Array) -> Array:
    """Return an array on this process's first device; one that is there already is not copied."""
    place = sharding_of(x)
    if place is None:
        return x
    return jax.block_until_ready(_gathered(x, whole(place))).addressable_data(0)


def on_all_devices(x: Array, place: NamedSharding | None) -> Array:
    """Lay what every process has on its one device over a mesh; None: it stays.

    Of several processes all are given the first one's. Theirs may differ by rounding, or in the
    sign of an eigenvector, where their machines do: rows of different bases would make none.
    """
    if place is None:
        return x
    owner = devices_of(place)[0]
    if jax.process_count() > 1:
        own = x if owner.process_index == jax.process_index() else None
        return from_owner(own, jax.ShapeDtypeStruct(x.shape, x.dtype), owner, place)
    host = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: host[index])


def _is_agreed(x: Array, place: NamedSharding | None) -> bool:
    """Return the word of the first process: a loop that one alone goes on with would hang."""
    with no_mesh():
        number = x.astype(np.int32)
    found = on_all_devices(number, None if place is None else whole(place))
    return bool(found.addressable_data(0))


@jax.jit
def _layer(x: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


@functools.partial(jax.jit, static_argnums=1)
def _gathered(x: Array, place: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, place)


@functools.partial(jax.jit, static_argnums=2)
def _product(matrix: Array, q: Array, place: NamedSharding | None) -> Array:
    y = jnp.matmul(matrix, q, precision=HIGHEST)
    return y if place is None else jax.lax.with_sharding_constraint(y, whole(place))


@jax.jit
def _symmetric_product(q: Array, y: Array) -> Array:
    h = jnp.matmul(q.T, y, precision=HIGHEST)
    return (h + h.T) / 2


@jax.jit
def _orthonormal(y: Array) -> Array:
    return jnp.linalg.qr(y)[0]
