"""Eigendecompositions of factors that lie on a mesh: each device decomposes some of the layers."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from jedit.core.devices import axes_of, fetched, no_mesh, sharding_of, spec_of
from jedit.curvature.checks import check_layers_finite
from jedit.curvature.eigenbases import Moment, eigenpairs, factorize, kept_rank
from jedit.curvature.factorization import Factorize
from jedit.curvature.mesh.placement import devices_of, even, from_owner, whole
from jedit.curvature.sketch import Sketched
from jedit.curvature.subspace import is_iterated
from jedit.curvature.types import Factor


def factorize_all(
    moments: Mapping[str, Moment],
    dtype: DTypeLike | None = None,
    *,
    how: Factorize = Factorize(),  # noqa: B008 - frozen and hashable
    starts: Mapping[str, Array] = MappingProxyType({}),
) -> dict[str, Factor]:
    """Return the eigenbases of all factors; where they lie on a mesh, each device decomposes some.

    A basis lies as its matrix does. Beside the factors a device holds some four whole matrices of
    the largest size. Leading eigenvectors are iterated one matrix after the other, each on all
    devices, from where `starts` says, by the factor's name. Devices that are CPUs of one process
    take turns: they share its cores, and LAPACK may not come back when it is called side by side.

    Raises:
        FloatingPointError: a factor is not finite, or could not be decomposed on the device whose
            turn it was; in every process.
    """
    factors, spread = {}, {}
    for name, moment in moments.items():
        matrix, block, hint = moment
        rank, is_sketch = kept_rank(how, matrix.shape[-1]), isinstance(matrix, Sketched)
        is_short = rank is not None and is_iterated(rank, matrix.shape[-1]) and not is_sketch
        sharding = None if is_sketch or matrix.ndim == 2 else sharding_of(matrix)
        if isinstance(matrix, Sketched) or sharding is None or how.by != "eigh" or is_short:
            start = fetched(starts[name]) if is_short and name in starts else None
            factors[name] = factorize(matrix, block, dtype=dtype, hint=hint, how=how, start=start)
        else:
            check_layers_finite(matrix, block, hint)
            spread[name] = (matrix, sharding, rank)
    with no_mesh():  # what is on one device cannot be computed with in the context of several
        blocks = {name: moments[name].block for name in spread}
        factors |= _factorize_spread(spread, dtype, blocks)
    return {name: factors[name] for name in moments}


def _factorize_spread(
    matrices: Mapping[str, tuple[Array, NamedSharding, int | None]],
    dtype: DTypeLike | None,
    blocks: Mapping[str, str],
) -> dict[str, Factor]:
    """Decompose as many layers' matrices at once as there are devices, equal sizes together."""
    if not matrices:
        return {}
    devices = devices_of(next(iter(matrices.values()))[1])
    # By size, so that the devices of one turn have matrices of one size and end together; the sort
    # is stable, hence alike in every process, which all must enter the same collectives.
    names = sorted(matrices, key=lambda name: -matrices[name][0].shape[-1])
    tasks = [(name, layer) for name in names for layer in range(len(matrices[name][0]))]
    pieces: dict[str, list[tuple[Array, ...]]] = {name: [] for name in names}
    factors, failures = {}, {}
    for first in range(0, len(tasks), len(devices)):
        turn = list(zip(tasks[first : first + len(devices)], devices, strict=False))
        # All are copied before any is decomposed: a copy is the work of every device.
        mine = [_on_device(*matrices[name][:2], layer, device) for (name, layer), device in turn]
        pairs = []
        for matrix, ((name, _), device) in zip(mine, turn, strict=True):
            pairs.append(None)
            if matrix is None:
                continue
            try:
                pairs[-1] = eigenpairs(matrix, dtype, matrices[name][2])
                # CPUs of one process share LAPACK's threads; accelerators go on side by side.
                if device.platform == "cpu":
                    jax.block_until_ready(pairs[-1])
            except Exception as error:  # whatever it is, the other processes wait for an answer
                nan = jnp.asarray(jnp.nan, matrix.dtype)
                pairs[-1], failures[name] = (nan, nan), error
        for ((name, _), device), pair in zip(turn, pairs, strict=True):
            matrix, sharding, rank = matrices[name]
            pieces[name].append(_from_owner(pair, matrix, rank, device, sharding))
            if len(pieces[name]) == len(matrix):
                bases, values = _stacked(pieces.pop(name), sharding)
                _check_decomposed(values, blocks[name], failures.get(name))
                factors[name] = Factor(matrix if rank is None else None, bases, values)
    return factors


def _check_decomposed(values: Array, block: str, failure: Exception | None) -> None:
    """Raise in every process what was an error in one, whose own it names as the cause.

    Raises:
        FloatingPointError: eigenvalues are not finite.
    """
    hint = "the device whose turn it was could not decompose it; its process says why"
    try:
        check_layers_finite(values, block, hint, "eigendecomposition of the curvature")
    except FloatingPointError as error:
        raise error from failure


def _on_device(matrix: Array, sharding: NamedSharding, layer: int, device: Any) -> Array | None:
    """Return one layer's matrix on one device; None when that is another process's."""
    # Waited for: else copies of a whole turn would be under way to every device.
    copies = jax.block_until_ready(_layer(matrix, jnp.int32(layer), whole(sharding)))
    mine = [x.data for x in copies.addressable_shards if x.device == device]
    return mine[0] if mine else None


@functools.partial(jax.jit, static_argnums=2)
def _layer(matrix: Array, layer: Array, place: NamedSharding) -> Array:
    chosen = jax.lax.dynamic_index_in_dim(matrix, layer, keepdims=False)
    return jax.lax.with_sharding_constraint(chosen, place)


def _from_owner(
    pair: tuple[Array, Array] | None,
    matrix: Array,
    rank: int | None,
    owner: Any,
    sharding: NamedSharding,
) -> tuple[Array, ...]:
    """Give all of the mesh the eigenvalues (1, d) and eigenvectors (1, d, d) that one device holds.

    Of a rank k they are (1, 1 + k) and (1, d, k). The pair is None where another process holds it,
    and of two numbers where it could not be found.
    """
    axes = tuple(a for entry in sharding.spec for a in axes_of(entry))
    d = matrix.shape[-1]
    shapes = [(1, d), (1, d, d)] if rank is None else [(1, 1 + rank), (1, d, rank)]
    split = even(NamedSharding(sharding.mesh, spec_of((), axes)), shapes[1], 0, 1, None)
    found = []
    for k, (shape, place) in enumerate(zip(shapes, (whole(sharding), split), strict=True)):
        own = None
        if pair is not None:
            own = jnp.broadcast_to(jnp.asarray(pair[k], matrix.dtype), shape)
        like = jax.ShapeDtypeStruct(shape, matrix.dtype)
        found.append(from_owner(own, like, owner, place))
    return tuple(found)


def _stacked(pairs: list[tuple[Array, ...]], sharding: NamedSharding) -> tuple[Array, Array]:
    """Return (bases, eigenvalues) of all layers."""
    values, bases = (jnp.concatenate(side) for side in zip(*pairs, strict=True))
    # After the concatenation, which has the layers in front: only now can they be split too.
    bases = jax.device_put(bases, even(sharding, bases.shape, 0, 1, None))
    values = jax.device_put(values, whole(sharding))
    return bases, values
