"""Write a steering into the weights, where the map is linear in what the parameters say."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_kind
from jedit.core.devices import on_auto_axes
from jedit.core.paths import parameter_paths
from jedit.core.precision import wide_dtype
from jedit.edits import Edit
from jedit.steering.steering import Affine, Steering, units_of
from jedit.tracing import Site, Sites, find_sites
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
            sites. Or a name is no site, or a map has other units than its site.
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
    is_held = weight.bias_path is not None or site.kind in ("bias", "embedding")
    if one.shift is not None and not is_held:
        return "it has no bias that could hold the shift; leave the shift out, or use `steered`"
    if shared := _shared(site, sites):
        return f"{shared} is used at several sites, and all of them would be moved"
    return None


def _shared(site: Site, sites: Sites) -> str | None:
    """Return a parameter of a site of which another site reads an entry too."""
    for path in site.weight.paths:
        others = [
            other
            for other in sites.values()
            if path in other.weight.paths and other.name != site.name
        ]
        if not others:
            continue
        with jax.ensure_compile_time_eval():
            mine = np.asarray(_entries(site, path)) > 0
            # One after the other: of a mixture each expert is a reader of one large leaf.
            if any((mine & (np.asarray(_entries(other, path)) > 0)).any() for other in others):
                return path
    return None


def _entries(site: Site, path: str) -> Array:
    """Return 1 for each entry of a parameter that a site reads."""
    weight = site.weight.bias_row if path == site.weight.bias_path else site.weight.kernel
    return weight.scatter(jnp.ones((weight.layers, weight.d_in, weight.d_out), jnp.float32))[path]


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
