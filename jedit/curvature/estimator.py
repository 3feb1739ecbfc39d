"""Estimators: three pure functions each, as an optax transform is two, and the batch loop."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
from jaxtyping import Array, PyTree

from jedit.core.arguments import (
    check_checkpoint,
    check_key,
    check_kind,
    check_params,
    checked_batches,
    refuse_tracers,
)
from jedit.core.batch import Batch, Resumable
from jedit.core.checks import COUNT, check_numbers
from jedit.core.devices import kept, on_auto, on_auto_axes, places_of
from jedit.core.display import short_repr
from jedit.curvature.memory import to_host
from jedit.curvature.types import Curvature


class Estimator(NamedTuple):
    """A way to estimate a curvature, as pure functions of a state of sums.

    States are sums, so those of disjoint data merge by adding them leaf by leaf,
    `jax.tree.map(jnp.add, one, other)`. They count outputs, positions and examples in int32: one
    estimate takes at most 2³¹ - 1 (2.1e9) of each.

    Attributes:
        init: `init(params, batch, first_example=0) -> state`, all zero; the batch gives shapes, and
            is looked at for padding that a site could not tell. Labels are sampled by running
            example number: a shard that begins with another `first_example` than zero draws the
            labels that those examples get in the whole.
        update: `update(state, params, batch, key) -> state`. Jit, vmap, scan and shard it. Give it
            one key for all batches, since labels depend on the key and on the example's number.
        finalize: `finalize(state, dtype=None) -> Curvature`; on the host, outside of jit. Matrices
            are decomposed in `dtype` (float64 also where JAX has it disabled; None: that of the
            sums), but for leading eigenvectors that are iterated or sketched. Raises
            `FloatingPointError` naming the block whose sums are not finite.
        groups: `groups(params, batch, group_bytes) -> (estimator, ...)`, of some parameters each,
            whose sums take so many bytes on a device; None: it cannot be parted.
        check: `check(params, batch, name)` refuses a batch whose masks or labels are none; None:
            it is taken as it is.
        planned: `planned(params, batch) -> (state, Curvature)`, shapes of what would be made, each
            with its place on a mesh; params and batch may be shapes themselves. None: it tells
            nothing.
    """

    init: Callable[..., Any]
    update: Callable[[Any, PyTree, Batch, Array], Any]
    finalize: Callable[..., Curvature]
    groups: Callable[..., tuple[Self, ...]] | None = None
    check: Callable[[PyTree, Batch, str], None] | None = None
    planned: Callable[[PyTree, Batch], tuple[Any, Curvature]] | None = None

    __repr__ = short_repr


_OUTSIDE = (
    "call it outside. What may be traced are the estimator's `update`, and `solve` and its like of "
    "the curvature that comes out"
)


def add_batch(
    update: jax.tree_util.Partial, state: Any, params: PyTree, batch: Batch, key: Array
) -> Any:
    """Add a batch to the sums, compiled; the state given is overwritten, and stays where it was."""
    return _add_batch(update, state, params, batch, key, places_of(state))


@jax.jit(donate_argnums=1, static_argnums=5)
def _add_batch(update, state, params, batch, key, places):
    return kept(update(state, params, batch, key), places)


@on_auto_axes
def estimate(
    estimator: Estimator,
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    *,
    key: Array,
    progress: bool = False,
    checkpoint: Resumable | None = None,
    group_bytes: int | None = None,
    offload: bool = False,
) -> Curvature:
    """Estimate a curvature at `params` over batches.

        estimator = kfac(apply, Categorical(), factorize="cholesky")  # no axis is decomposed
        curvature = estimate(estimator, params, batches, key=key)

    The loop compiles once for batches of one shape and moves nothing to the host between them.
    Where params lie on a mesh, every sum and factor lies as its parameter does, each device
    decomposes some of the factors, and batches may be split over it by their rows. The mesh's axes
    may be of either type; a model that itself needs explicit ones, as `out_sharding=` does, is
    given as `jax.sharding.explicit_axes(apply, in_sharding=...)`, in `jax.set_mesh(mesh)`.

    Args:
        estimator: `kfac(...)`, `ekfac(...)` or `diagonal(...)`.
        params: the parameters at which the curvature is taken.
        batches: a `Batch`, or any iterable of them.
        key: a `jax.random.key`; labels are sampled from it by example number, so that the result
            does not depend on how examples are cut into batches.
        progress: show a progress bar (needs tqdm).
        checkpoint: a `jedit.Checkpoint`: the sums are saved every so many batches, and the same
            call again goes on from the last save, to the bit. The batches that were seen are drawn
            again, moved to the host and compared by a hash.
        group_bytes: parameters are taken in groups whose sums take at most so many bytes on a
            device, with a pass over the batches for each; what cannot be parted (sites that read
            one input) may be larger. None: all at once.
        offload: factors go to the host's memory once made, group by group; `solve` and its like
            fetch them block by block.

    Returns:
        The curvature.

    Raises:
        TypeError: an argument is something else.
        ValueError: no batch, none that counts an output, or what the estimator finds wrong with
            one, such as an axis that is too long to be decomposed; a call under `jax.jit` or
            another transformation; the checkpoint is of another call; or `group_bytes` with a
            checkpoint, with batches that come only once, or with an estimator that cannot be
            parted.
        FloatingPointError: a block's sums are not finite.
    """
    check_numbers(COUNT, group_bytes=group_bytes)
    check_kind(estimator, Estimator, "estimator", "such as kfac(apply, likelihood)")
    check_params(params)
    check_key(key)
    check_checkpoint(checkpoint)
    batches = checked_batches(batches)
    refuse_tracers("estimate", (params, key), _OUTSIDE)
    if group_bytes is not None:
        if checkpoint is not None:
            raise ValueError(
                "give group_bytes or a checkpoint: a checkpoint holds one group's sums"
            )
        estimators = _groups(estimator, params, batches, group_bytes)
        parts = [
            estimate(one, params, batches, key=key, progress=progress, offload=offload)
            for one in estimators
        ]
        return _joined(parts)
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc="curvature", unit="batch")
    update = estimator.update
    if not isinstance(update, jax.tree_util.Partial):
        # A Partial is a pytree: jit takes its function as static, its arrays (bases) as arguments.
        update = jax.tree_util.Partial(update)
    state, number, done = None, 0, 0
    with contextlib.nullcontext() if checkpoint is None else contextlib.closing(checkpoint):
        for number, batch in enumerate(batches, 1):
            batch = on_auto(batch)
            if estimator.check is not None:
                estimator.check(params, batch, f"batch {number}")
            if state is None:
                refuse_tracers("estimate", batch, _OUTSIDE)
                state = estimator.init(params, batch)
                if checkpoint is not None:
                    # The update's own arrays, such as bases, say what the sums mean.
                    given = (params, key, jax.tree.leaves(update))
                    done, state, _ = checkpoint.resume("estimate", given, state)
            if checkpoint is not None:
                checkpoint.see(batch)
            # Batches of before the checkpoint are drawn and hashed, but not summed again.
            if number > done:
                state = add_batch(update, state, params, batch, key)
                if checkpoint is not None and number % checkpoint.every == 0:
                    checkpoint.save(number, state)
        if state is None:
            raise ValueError("estimate got no batch: a curvature needs at least one")
        if number < done:
            raise ValueError(f"the checkpoint is of {done} batches or more, got {number}")
        if checkpoint is not None and number > done and number % checkpoint.every:
            checkpoint.save(number, state)
    curvature = estimator.finalize(state)
    return to_host(curvature) if offload else curvature


def estimate_in_groups(
    estimator: Estimator,
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    *,
    key: Array,
    group_bytes: int,
) -> Iterator[Curvature]:
    """Estimate the curvature of one group of parameters after the other, at `params`.

    Together they are what `estimate` with the same `group_bytes` joins: for what needs one group at
    a time, such as `methods.kfade`, where the factors of all do not fit in any memory.

    Args:
        estimator: `kfac(...)`, `ekfac(...)` or `diagonal(...)`.
        params: the parameters at which the curvature is taken.
        batches: a `Batch`, or batches that can be passed over once for each group.
        key: as for `estimate`.
        group_bytes: as for `estimate`.

    Returns:
        The curvatures of the groups, each made when it is asked for and kept by nobody else.

    Raises:
        TypeError: an argument is something else.
        ValueError: what `estimate` refuses of `group_bytes` and of the batches.
        FloatingPointError: a block's sums are not finite.
    """
    check_numbers(COUNT, group_bytes=group_bytes)
    check_kind(estimator, Estimator, "estimator", "such as kfac(apply, likelihood)")
    check_params(params)
    check_key(key)
    batches = checked_batches(batches)
    refuse_tracers("estimate_in_groups", (params, key), _OUTSIDE)
    groups = on_auto_axes(_groups)(estimator, params, batches, group_bytes)
    return (estimate(one, params, batches, key=key) for one in groups)


def _groups(estimator, params, batches, group_bytes):
    """Return the groups' estimators.

    Raises:
        ValueError: `group_bytes` cannot be used with this estimator or these batches.
    """
    if estimator.groups is None:
        raise ValueError("group_bytes needs an estimator with `groups`: kfac, ekfac or diagonal")
    if iter(batches) is batches:
        raise ValueError(
            "group_bytes passes over the batches once for each group, but these come only once: "
            "give a list, or an object whose __iter__ begins again"
        )
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("estimate got no batch: a curvature needs at least one")
    return estimator.groups(params, on_auto(first), group_bytes)


def _joined(curvatures: Sequence[Curvature]) -> Curvature:
    """Join curvatures of different parameters, taken over the same data, into one."""
    blocks, factors = {}, {}
    for curvature in curvatures:
        blocks |= curvature.blocks
        factors |= curvature.factors
    return Curvature(blocks, factors, curvatures[0].num_outputs)
