"""What a row of data says at a site: one vector of its outputs, pooled over positions."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_word
from jedit.core.batch import Batch
from jedit.core.checks import FINITE, check_numbers, is_known
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import counted_outputs
from jedit.core.paths import parameter_paths
from jedit.core.precision import wide, wide_dtype
from jedit.core.row_blocks import pieces_of
from jedit.steering.fold import holds_shift, why_not_folded
from jedit.steering.steering import Affine, Scalar, Steering, run_steered, whole_outputs
from jedit.tracing import find_sites
from jedit.tracing.rewrite import named_sites

Pool = Literal["mean", "last"]
Pooled = dict[str, Array]  # by site, (layers, rows, units)


def identity(
    apply: Callable,
    params: PyTree,
    inputs: PyTree,
    sites: Sequence[str],
    *,
    is_foldable: bool = False,
) -> Steering:
    """Return the steering that moves nothing, with a gain and a shift for every unit of the sites.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays.
        inputs: inputs of the shape that it is called on; none is read.
        sites: names of sites, as `find_sites` prints them.
        is_foldable: whether to leave out the parts that `fold` would refuse: shifts without a bias
            to hold them, and gains of what is only added; False leaves none out.

    Raises:
        ValueError: no site is named, a name is no site, or nothing of a site would fold.
    """
    if not sites:
        raise ValueError("no site is named that could be steered")
    maps, found = {}, find_sites(apply, params, inputs)
    for name, site in named_sites(found, dict.fromkeys(sites)).items():
        shape = (site.weight.layers, site.weight.d_out)
        dtype = wide_dtype(site.output_dtype)
        one = Affine(gain=jnp.ones(shape, dtype), shift=jnp.zeros(shape, dtype))
        if is_foldable:
            one = Affine(
                gain=None if site.kind == "bias" else one.gain,
                shift=one.shift if holds_shift(site) else None,
            )
            if why := why_not_folded(site, one, found):
                raise ValueError(f"{name} does not fold into weights: {why}")
        maps[name] = one
    return Steering(maps)


def pooled_outputs(
    apply: Callable,
    params: PyTree,
    rows: Batch,
    steering: Steering,
    *,
    strength: Scalar = 1.0,
    pool: Pool = "mean",
) -> Pooled:
    """Return one vector for each row and each site of a steering: its moved outputs, bias and all.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays.
        rows: the rows. Of their positions those count that are in `mask` and `valid`.
        steering: which sites, and how they are moved; `identity` moves nothing.
        strength: of the steering, 1.0 for the whole.
        pool: "mean" over a row's positions that count, or the "last" of them.

    Returns:
        By site (layers, rows, units), in float32 or wider. A row without positions is zero. It is
        jitted: of the forward pass what no site needs, as the logits, is not computed.

    Raises:
        ValueError: a site's positions are not the outputs'.
    """
    check_word(Pool, pool=pool)
    check_numbers(FINITE, strength=strength)
    return _pooled_outputs(apply, pool, params, rows, steering, strength)


@on_auto_axes
@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled_outputs(
    apply: Callable, pool: Pool, params: PyTree, rows: Batch, steering: Steering, strength: Scalar
) -> Pooled:
    run = run_steered(apply, params, rows.inputs, steering, strength=strength)
    lead = run.outputs.shape[:-1]
    weights = _weights(rows, lead, pool)
    found = whole_outputs(run, dict(parameter_paths(params)))
    return {name: _pooled(name, h, weights) for name, h in found.items()}


def pooled_in_pieces(
    apply: Callable, params: PyTree, rows: Batch, steering: Steering, pool: Pool
) -> Pooled:
    """Return `pooled_outputs` of many rows, in blocks of rows."""
    parts = [
        pooled_outputs(apply, params, part, steering, pool=pool)
        for part in pieces_of(apply, params, rows)
    ]

    def in_order(name: str) -> Array:
        # Of N blocks, block j has the rows j, j + N, ...: the blocks are the inner axis.
        h = jnp.stack([part[name] for part in parts], axis=2)
        return h.reshape(h.shape[0], -1, h.shape[-1])

    return {name: in_order(name) for name in parts[0]}


def rows_that_count(*sets: Batch) -> tuple[Batch, ...]:
    """Return sets of the same rows without those of which one counts nothing, as padding does.

    Where a mask is traced nothing is left out.

    Raises:
        ValueError: no row is left, or the sets have not as many rows.
    """
    masks = [x for rows in sets for x in (rows.mask, rows.valid) if x is not None]
    count = len(jax.tree.leaves(sets[0].inputs)[0])
    if not all(map(is_known, masks)):
        return sets
    keeps = np.ones(count, bool)
    for rows in sets:
        counted = np.ones((count, 1), bool)
        for given in (rows.mask, rows.valid):
            if given is not None:
                counted = counted & (np.asarray(given).reshape(count, -1) != 0)
        keeps &= counted.any(axis=1)
    if not keeps.any():
        raise ValueError("no row counts: mask and valid leave out all of them")
    if keeps.all():
        return sets
    which = np.flatnonzero(keeps)
    return tuple(jax.tree.map(lambda x: jnp.asarray(x)[which], rows) for rows in sets)


def _weights(rows: Batch, lead: tuple[int, ...], pool: Pool) -> Float[Array, "n positions"]:
    """Return 1 for each position that is read of its row, else 0."""
    counts = counted_outputs(rows, lead).astype(jnp.float32).reshape(lead[0], -1)
    if pool == "last":
        numbers = jnp.arange(1, counts.shape[1] + 1, dtype=jnp.float32)[None]
        last = jnp.max(counts * numbers, axis=1, keepdims=True)
        counts = counts * (numbers == last).astype(jnp.float32)
    return counts


def _pooled(
    name: str, h: Array, weights: Float[Array, "n positions"]
) -> Float[Array, "layers n units"]:
    n, t = weights.shape
    layers, *positions, units = h.shape
    # The outputs' axes lead, or are merged; what follows (heads, pixels) is averaged over.
    merged, k = 1, 0
    while k < len(positions) and merged < n * t:
        merged *= positions[k]
        k += 1
    is_known = merged == n * t and (positions[:1] == [n] or k == 1)
    if not is_known:
        raise ValueError(
            f"{name}: its positions {tuple(positions)} are not the outputs' {(n, t)}, rows in front"
        )
    h = wide(h).reshape(layers, n, t, -1, units).mean(axis=3)
    at = weights.astype(h.dtype)[None, :, :, None]
    # Where nothing counts, as in padding, even what is not finite must not.
    return jnp.sum(jnp.where(at > 0, h, 0), axis=2) / jnp.maximum(jnp.sum(at, axis=2), 1)


def means(found: Mapping[str, Array]) -> dict[str, Float[Array, "layers units"]]:
    """Return the mean over rows of what was pooled."""
    return {name: jnp.mean(h, axis=1) for name, h in found.items()}
