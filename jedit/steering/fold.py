"""Write a steering into the weights, where the map is linear in what the parameters say."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_kind
from jedit.core.devices import on_auto_axes
from jedit.core.paths import parameter_paths
from jedit.core.precision import wide_dtype
from jedit.edits import Edit
from jedit.steering.steering import Affine, Steering, units_of
from jedit.tracing import Site, Sites, Weight, find_sites
from jedit.tracing.rewrite import named_sites


@on_auto_axes
def fold(apply: Callable, params: PyTree, inputs: PyTree, steering: Steering) -> Edit:
    """Return the edit after which `apply` does what the steered function does.

        W <- W diag(a)          b₀ <- a b₀ + b

    The edit is linear in the strength: `apply_edit(params, edit, scale)` is the function steered at
    that strength. A table that is looked up in holds a shift in all its rows; any other weight
    needs a bias for it.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: the parameters that are to be edited.
        inputs: inputs of the shape that it is called on, or `jax.ShapeDtypeStruct`s; none is read.
        steering: the maps.

    Returns:
        The change of each weight and bias, in float32 or wider.

    Raises:
        ValueError: a map does not fold: its strength depends on the input, it shifts a site that
            has no bias, it has a gain for what is only added, or its weight is used at several
            sites or where no gradient flows. Or a name is no site, or a map has other units than
            its site.
    """
    check_kind(steering, Steering, "steering", "as `mean_difference` makes it")
    sites = find_sites(apply, params, inputs)
    leaves = dict(parameter_paths(params))
    changes: dict[str, Array] = {}
    for name, site in named_sites(sites, steering.maps).items():
        one = steering.maps[name]
        if why := why_not_folded(site, one, sites):
            raise ValueError(f"{name} does not fold into weights: {why}")
        for path, part in _folded(name, site, one, leaves).items():
            changes[path] = changes[path] + part if path in changes else part
    return Edit(changes)


def why_not_folded(site: Site, one: Affine, sites: Sites) -> str | None:
    """Say why a map is not one of the parameters; None where it is.

    Args:
        site: the site whose output is mapped.
        one: its map.
        sites: all sites of the function.
    """
    weight = site.weight
    if one.gate is not None:
        return "its strength depends on the input; steer it by `steered`"
    if one.gain is not None and site.kind == "bias":
        return f"{weight.path} is added to an output that no weight of it makes; leave out the gain"
    if one.shift is not None and not holds_shift(site):
        return "it has no bias that could hold the shift; leave the shift out, or use `steered`"
    for path in weight.paths:
        if path in sites.stopped:
            return (
                f"{path} is used where no gradient flows too, and what it is there would be moved"
            )
        if _is_shared(site, path, sites):
            return f"{path} is used at several sites, and all of them would be moved"
    return None


def holds_shift(site: Site) -> bool:
    """Say whether a parameter of a site could hold a shift of its output."""
    return site.weight.bias_path is not None or site.kind in ("bias", "embedding")


def _is_shared(site: Site, path: str, sites: Sites) -> bool:
    """Say whether another site reads an entry of a parameter that this one reads."""
    mine = _reading(site, path)
    for other in sites.values():
        if other.name == site.name or path not in other.weight.paths:
            continue
        # Of a mixture each expert is a reader of one large leaf, and its box tells it apart.
        others = _reading(other, path)
        if _are_apart(mine, others):
            continue
        with jax.ensure_compile_time_eval():
            if bool(jnp.any((_entries(mine) > 0) & (_entries(others) > 0))):
                return True
    return False


def _reading(site: Site, path: str) -> Weight:
    """Return what a site reads of one of its parameters."""
    return site.weight.bias_row if path == site.weight.bias_path else site.weight.kernel


def _are_apart(one: Weight, other: Weight) -> bool:
    """Say whether an axis of a leaf shows that two of its readers have no entry in common."""
    for axis in range(len(one.shape)):
        here, there = one.places(axis), other.places(axis)
        if here.max() < there.min() or there.max() < here.min():
            return True
    return False


def _entries(weight: Weight) -> Array:
    """Return 1 for each entry of its leaf that a weight reads."""
    ones = jnp.ones((weight.layers, weight.d_in, weight.d_out), jnp.float32)
    return weight.scatter(ones)[weight.path]


def _folded(name: str, site: Site, one: Affine, leaves: Mapping[str, Array]) -> dict[str, Array]:
    kernel, found = site.weight.kernel, {}
    dtype = wide_dtype(leaves[kernel.path].dtype)
    gain = None if one.gain is None else units_of(name, site, one.gain, "gain").astype(dtype)
    shift = None if one.shift is None else units_of(name, site, one.shift, "shift").astype(dtype)
    change = None
    if gain is not None:
        matrix = kernel.gather({kernel.path: leaves[kernel.path].astype(dtype)})
        change = (gain - 1)[:, None] * matrix
    if shift is not None and site.weight.bias_path is None:  # a table, or a bias by itself
        rows = jnp.broadcast_to(shift[:, None], (kernel.layers, kernel.d_in, kernel.d_out))
        change = rows / site.scale if change is None else change + rows / site.scale
    if change is not None:
        found |= kernel.scatter(change)
    if site.weight.bias_path is not None:
        row = site.weight.bias_row
        bias = row.gather({row.path: leaves[row.path].astype(dtype)})[:, 0]
        moved = jnp.zeros_like(bias)
        if gain is not None:
            moved = moved + (gain - 1) * bias
        if shift is not None:
            moved = moved + shift / site.bias_scale
        found |= row.scatter(moved[:, None])
    return found
