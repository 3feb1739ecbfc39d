"""Run a function with the outputs of some of its sites changed on the way: adding and patching."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.tracing.discover import trace_program
from jedit.tracing.interpreter import Records, Replacement, evaluate
from jedit.tracing.pullback import argument_leaves
from jedit.tracing.sites import cut


class Intervention(NamedTuple):
    """The results of a forward pass in which the outputs of some sites were changed.

    Attributes:
        outputs: what `apply` returned.
        activations: per site what enters it, as in `capture`.
        site_outputs: per site its output after the intervention, before its bias is added.
    """

    outputs: Array
    activations: dict[str, Array]
    site_outputs: dict[str, Array]

    __repr__ = short_repr


@on_auto_axes
def intervene(
    apply: Callable,
    params: PyTree,
    inputs: PyTree,
    *,
    add: Mapping[str, Array] | None = None,
    replace: Mapping[str, tuple[Array, Array]] | None = None,
    select: str | Sequence[str] | None = None,
) -> Intervention:
    """Run `apply` once, changing the outputs of named sites, and keep inputs and outputs of all.

    Differentiable in what is added and put in place. Costs one forward pass.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays.
        inputs: pytree of arrays that lead with the examples.
        add: by site, an array that broadcasts to its output and is added to it.
        replace: by site, `(mask, value)`: where the mask holds, the value takes the output's
            place; both broadcast to it (axes of scans in front).
        select: which sites are kept, as in `find_sites`; the named ones must be among them.

    Returns:
        The outputs, the activations and the sites' outputs.

    Raises:
        ValueError: a name is no site, or is in both mappings; or `find_sites` refuses.
    """
    add, replace = dict(add or {}), dict(replace or {})
    program = trace_program(apply, params, inputs, select)
    if unknown := [name for name in {**add, **replace} if name not in program.sites]:
        known = ", ".join(list(program.sites)[:12])
        raise ValueError(f"{unknown} are no sites of this function; its sites are: {known}")
    if both := sorted(set(add) & set(replace)):
        raise ValueError(f"{both} stand in add and in replace; a site is changed in one way")
    probes = program.plan.probes()
    for name, site in program.sites.items():
        # Sites of joined parameters share one probe: each writes into its own window of it.
        window = tuple(slice(start, stop) for start, stop in site.window_out or ())
        shape, probe = site.output_shape, probes[site.probe]
        if name in replace:
            mask, value = (jnp.broadcast_to(jnp.asarray(x), shape) for x in replace[name])
            if not isinstance(probe, Replacement):
                probe = Replacement(probe, jnp.zeros(probe.shape, bool), jnp.zeros_like(probe))
            probe = probe._replace(
                mask=probe.mask.at[window].set(mask),
                value=probe.value.at[window].set(value.astype(site.output_dtype)),
            )
        elif name in add:
            added = jnp.broadcast_to(jnp.asarray(add[name]).astype(site.output_dtype), shape)
            if isinstance(probe, Replacement):
                probe = probe._replace(added=probe.added.at[window].add(added))
            else:
                probe = probe.at[window].add(added)
        probes[site.probe] = probe
    records = Records(is_watching=True)
    jaxpr = program.jaxpr
    leaves = argument_leaves(params, inputs)
    outs = evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, program.plan, probes, records)
    activations = {
        name: cut(records.activations[site.record], site.window_in)
        for name, site in program.sites.items()
        if site.record is not None
    }
    outputs = {
        name: cut(records.outputs[site.probe], site.window_out)
        for name, site in program.sites.items()
    }
    return Intervention(outs[0], activations, outputs)
