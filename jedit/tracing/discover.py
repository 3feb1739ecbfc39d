"""Trace `apply`, check what came in, and name the sites that the walk finds."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core
from jaxtyping import PyTree

from jedit.core.arguments import check_function, check_inputs, check_params
from jedit.core.devices import on_auto_axes
from jedit.core.paths import leaves_with_paths, parameter_paths, selected_paths
from jedit.tracing.drafts import Scope
from jedit.tracing.interpreter import Plan
from jedit.tracing.liveness import Flow
from jedit.tracing.provenance import Provenance
from jedit.tracing.sites import Site, Sites
from jedit.tracing.walker import Value, Walker


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced `apply` with its sites and the plan to tap them.

    Attributes:
        jaxpr: the jaxpr of `apply`, with its constants.
        sites: the sites of the selected parameters.
        plan: the plan of where probes are put and what is kept.
        num_branches: how many branches all `cond`s have together.
        num_params: the number of the parameters' leaves, which the inputs' leaves follow.
    """

    jaxpr: jex_core.ClosedJaxpr
    sites: Sites
    plan: Plan
    num_branches: int
    num_params: int


@on_auto_axes
def find_sites(
    apply: Callable, params: PyTree, inputs: PyTree, select: str | Sequence[str] | None = None
) -> Sites:
    """Find every equation of `apply(params, inputs)` in which an activation meets a parameter.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays, or of `jax.ShapeDtypeStruct`.
        inputs: pytree of arrays that lead with the examples.
        select: regular expression, or several, searched in the parameter paths; None selects all.

    Returns:
        The sites, and in `.uncovered` the reason for each selected parameter that has none;
        printed, they are the coverage table.

    Raises `TypeError` for an argument that is something else, `ValueError` when `apply` does not
    return one array, a parameter is not real floating point, two have one path, a pattern matches
    no parameter or is none, or the inputs' leading axes disagree.
    """
    return trace_program(apply, params, inputs, select).sites


def trace_program(apply, params, inputs, select=None) -> Program:
    """Trace `apply` abstractly and find its sites.

    Raises:
        ValueError: the parameters or inputs are refused as by `find_sites`.
    """
    check_function(apply)
    check_params(params)
    check_inputs(inputs)
    named = parameter_paths(params)
    selected = selected_paths([path for path, _ in named], select)
    _check_inputs(named, inputs)
    jaxpr, shape = jax.make_jaxpr(apply, return_shape=True)(params, inputs)
    if not isinstance(shape, jax.ShapeDtypeStruct):
        kind = jax.tree_util.tree_structure(shape)
        raise ValueError(
            f"apply must return one array (the model's outputs), but it returned {kind}; "
            "wrap it so that it returns the logits alone"
        )
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(
            f"apply must return a real floating-point array, but its dtype is {shape.dtype}; "
            "return the logits, not what is decided from them"
        )
    # A parameter that is not selected has no origin: it counts as a number that depends on
    # parameters, and is neither followed nor refused.
    walker = Walker()
    values = []
    for i, variable in enumerate(jaxpr.jaxpr.invars):
        if i < len(named) and named[i][0] in selected:
            origin = Provenance.of_leaf(named[i][0], variable.aval.shape)
            values.append(Value(("in", i), on_params=True, origin=origin))
        else:
            values.append(Value(("in", i), on_data=i >= len(named), on_params=i < len(named)))
    outs, plan = walker.walk(jaxpr.jaxpr, jaxpr.consts, values, Scope(), [Flow.GRADIENT])
    for value in outs:
        walker.refuse(value.origin, "is returned by apply as it is", Scope())
    drafts = walker.resolve(selected)
    # Taps of drafts that were refused, or became another site's bias, are taken out again.
    plan = plan.restricted({draft.site.probe for draft in drafts})
    sites = _named([draft.site for draft in drafts])
    uncovered = {path: walker.refused[path] for path in selected if path in walker.refused}
    found = Sites(sites, uncovered, walker.stopped)
    return Program(jaxpr, found, plan, walker.num_branches, len(named))


def _check_inputs(named, inputs) -> None:
    for path, leaf in named:
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            kinds = {"complex": jnp.complexfloating, "integer": jnp.integer, "boolean": jnp.bool_}
            kind = next((k for k, t in kinds.items() if jnp.issubdtype(dtype, t)), "non-numeric")
            raise ValueError(
                f"parameter {path!r} has {kind} dtype {dtype}; jedit edits real floating-point "
                "parameters: close over the others, or leave them out of params"
            )
    lengths = {
        path or "inputs": jnp.shape(x)[0]
        for path, x in leaves_with_paths(inputs)
        if jnp.ndim(x) > 0
    }
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the leading axes of the inputs disagree: {lengths}; "
            "every leaf leads with the examples"
        )


def _named(sites: list[Site]) -> tuple[Site, ...]:
    seen: dict[str, int] = {}
    out = []
    for site in sites:
        k = seen.get(site.path, 0)
        seen[site.path] = k + 1
        out.append(dataclasses.replace(site, name=site.path if k == 0 else f"{site.path}#{k}"))
    return tuple(out)
