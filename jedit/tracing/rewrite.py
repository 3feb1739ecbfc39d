"""Run a function with the outputs of some of its sites computed anew, each from itself."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.arguments import nearest
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.paths import parameter_paths
from jedit.tracing.discover import trace_program
from jedit.tracing.interpreter import Records, Rewrite, evaluate
from jedit.tracing.pullback import argument_leaves
from jedit.tracing.sites import Site, Sites, cut

Function = Callable[[Array, Any], Array]
# Of a site and the parameters by path: a function of the site's output and of what it is given.
Making = Callable[[Site, Mapping[str, Array]], tuple[Function, PyTree]]


class Rewritten(NamedTuple):
    """The results of a forward pass in which the outputs of some sites were computed anew.

    Attributes:
        outputs: what `apply` returned.
        site_outputs: per changed site its new output, before its bias is added, scans in front.
        sites: the changed sites.
    """

    outputs: Array
    site_outputs: dict[str, Array]
    sites: dict[str, Site]

    __repr__ = short_repr


@on_auto_axes
def rewrite_outputs(
    apply: Callable, params: PyTree, inputs: PyTree, changes: Mapping[str, Making]
) -> Rewritten:
    """Run `apply` once, with the outputs of the named sites replaced by functions of themselves.

    Differentiable in the parameters and in what the functions are given. Costs one forward pass;
    nothing but the changed outputs is kept.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays.
        inputs: pytree of arrays that lead with the examples.
        changes: by site, what returns `(function, given)` for the site and the parameters by path.
            `function(output, given)` is called where the site stands. In a scan it sees the output
            of one iteration; `given`, a tree of arrays that broadcast to the site's output with the
            scans in front (`Site.laid_out`), reaches it sliced like that.

    Raises:
        ValueError: a name is no site, or `find_sites` refuses.
    """
    program = trace_program(apply, params, inputs)
    sites = named_sites(program.sites, changes)
    leaves, places = argument_leaves(params, inputs), parameter_paths(params)
    by_path = {path: leaf for (path, _), leaf in zip(places, leaves, strict=False)}
    plan = program.plan.restricted({site.probe for site in sites.values()})
    shapes = {tap.probe: tap.shape for tap in plan.all_taps()}
    probes = {
        probe: _at_one_equation(
            shape,
            {name: site for name, site in sites.items() if site.probe == probe},
            lambda name: changes[name](sites[name], by_path),
        )
        for probe, shape in shapes.items()
    }
    records, jaxpr = Records(is_watching=True), program.jaxpr
    outs = evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, plan, probes, records)
    kept = {n: cut(records.outputs[site.probe], site.window_out) for n, site in sites.items()}
    return Rewritten(outs[0], kept, sites)


def named_sites(sites: Sites, names: Mapping[str, Any]) -> dict[str, Site]:
    """Return the sites of these names.

    Raises:
        ValueError: a name is no site; the reason is said where the parameter is not covered.
    """
    for name in names:
        if name in sites:
            continue
        if name in sites.uncovered:
            raise ValueError(f"{name!r} has no site: it {sites.uncovered[name]}")
        raise ValueError(f"{name!r} is no site of this function; {nearest(name, sites)}")
    return {name: sites[name] for name in names}


def _at_one_equation(
    shape: tuple[int, ...],
    sites: Mapping[str, Site],
    make: Callable[[str], tuple[Function, PyTree]],
) -> Rewrite:
    """Return the probe of one equation, whose output is shared by sites of joined parameters."""
    functions, given = [], []
    for name, site in sites.items():
        function, arrays = make(name)
        num_scans = site.num_scans
        window = site.window_out or tuple((0, n) for n in shape)
        scans, box = window[:num_scans], tuple(slice(*part) for part in window[num_scans:])
        functions.append((function, box))
        place = tuple(slice(*part) for part in scans)
        lengths = shape[:num_scans]

        def spread(x: Array, place=place, lengths=lengths, scans=scans) -> Array:
            """Return an array with the whole scans' axes, zero in iterations of other sites."""
            n = len(lengths)
            inside = tuple(stop - start for start, stop in scans)
            x = jnp.broadcast_to(x, (*inside, *x.shape[n:]))
            if inside == lengths:
                return x
            return jnp.zeros((*lengths, *x.shape[n:]), x.dtype).at[place].set(x)

        is_here = spread(jnp.ones((1,) * len(shape), bool))
        given.append((is_here, jax.tree.map(spread, arrays)))

    def change(output: Array, given: list) -> Array:
        for (function, box), (is_here, arrays) in zip(functions, given, strict=True):
            part = output[box]
            new = function(part, arrays).astype(output.dtype)
            output = output.at[box].set(jnp.where(is_here, new, part))
        return output

    def whole(output: Array, given: list) -> Array:
        return functions[0][0](output, given[0][1]).astype(output.dtype)

    is_alone = all(site.window_out is None for site in sites.values()) and len(sites) == 1
    return Rewrite(whole if is_alone else change, given)
