"""Run a function with the outputs of some of its sites changed on the way: adding and patching."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.capture.capture import argument_leaves
from jedit.capture.discover import trace
from jedit.capture.interpreter import Records, Replacement, evaluate
from jedit.display import short_repr


class Intervention(NamedTuple):
    """A pass that was intervened in.

    Attributes:
        outputs: what `apply` returned.
        activations: per site what enters it, as in `capture`.
        site_outputs: per site its output after the intervention, before its bias is added.
    """

    outputs: Array
    activations: dict[str, Array]
    site_outputs: dict[str, Array]

    __repr__ = short_repr


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
        ValueError: a name is no site, or is in both mappings; and as in `find_sites`.
    """
    add, replace = dict(add or {}), dict(replace or {})
    program = trace(apply, params, inputs, select)
    if unknown := [name for name in {**add, **replace} if name not in program.sites]:
        known = ", ".join(list(program.sites)[:12])
        raise ValueError(f"{unknown} are no sites of this function; its sites are: {known}")
    if both := sorted(set(add) & set(replace)):
        raise ValueError(f"{both} stand in add and in replace; a site is changed in one way")
    taps = sorted({tap.probe for tap in program.plan.all_taps()})
    probe_of = dict(zip(program.sites, taps, strict=True))
    probes = {}
    for name, site in program.sites.items():
        shape, dtype = site.output_shape, site.output_dtype
        if name in replace:
            mask, value = replace[name]
            value = jnp.broadcast_to(jnp.asarray(value).astype(dtype), shape)
            probe = Replacement(jnp.broadcast_to(mask, shape), value)
        else:
            probe = jnp.broadcast_to(jnp.asarray(add.get(name, 0)).astype(dtype), shape)
        probes[probe_of[name]] = probe
    records = Records(is_watching=True)
    jaxpr = program.jaxpr
    leaves = argument_leaves(params, inputs)
    outs = evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, program.plan, probes, records)
    activations = {
        name: records.activations[site.record]
        for name, site in program.sites.items()
        if site.record is not None
    }
    outputs = {name: records.outputs[probe] for name, probe in probe_of.items()}
    return Intervention(outs[0], activations, outputs)
