"""Which equations of a jaxpr matter to its outputs, and through which of them gradients flow."""

import enum
from collections import Counter
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex_core

from jedit.tracing import versions
from jedit.tracing.versions import inner_jaxprs


class Flow(enum.IntEnum):
    """The kind of what depends on an equation or a variable: nothing, values, or gradients too."""

    DEAD = 0
    VALUE = 1
    GRADIENT = 2


def flows(jaxpr, out_flows: list[Flow]) -> tuple[list[Flow], dict[Any, Flow]]:
    """Return the flow of every equation and of every variable, given those of the outputs.

    An equation that stops gradients, or whose outputs are no floating-point numbers, is of values
    alone, and so is what only such equations read. What only dead code reads is not used.
    """
    needed: dict[Any, Flow] = {}

    def need(atom, flow: Flow) -> None:
        if not isinstance(atom, jex_core.Literal):
            needed[atom] = max(flow, needed.get(atom, Flow.DEAD))

    for variable, flow in zip(jaxpr.outvars, out_flows, strict=True):
        need(variable, flow)
    found = [Flow.DEAD] * len(jaxpr.eqns)
    for i in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[i]
        outs = [needed.get(v, Flow.DEAD) for v in eqn.outvars]
        flow = max([*outs, Flow.VALUE if eqn.effects else Flow.DEAD])
        is_differentiable = eqn.primitive.name not in versions.NO_GRADIENT
        if not is_differentiable or not any(map(_is_floating, eqn.outvars)):
            flow = min(flow, Flow.VALUE)
        found[i] = flow
        if flow == Flow.DEAD:
            continue
        reads = [flow] * len(eqn.invars)
        if eqn.primitive.name in versions.INLINED:
            body = inner_jaxprs(eqn)[0].jaxpr
            _, inside = flows(body, outs)
            # An argument that the body does not read is as dead as if the call were written out.
            reads = [min(flow, inside.get(v, Flow.DEAD)) for v in body.invars]
        for atom, read in zip(eqn.invars, reads, strict=True):
            need(atom, read)
    return found, needed


def use_counts(jaxpr, found: list[Flow], out_flows: list[Flow]) -> Counter:
    """Count how often equations and outputs through which gradients flow read each variable."""
    counts: Counter = Counter()
    for eqn, flow in zip(jaxpr.eqns, found, strict=True):
        if flow == Flow.GRADIENT:
            counts.update(v for v in eqn.invars if not isinstance(v, jex_core.Literal))
    counts.update(
        v
        for v, flow in zip(jaxpr.outvars, out_flows, strict=True)
        if flow == Flow.GRADIENT and not isinstance(v, jex_core.Literal)
    )
    return counts


def carry_flows(body, num_consts: int, num_carry: int, out_flows: list[Flow]) -> list[Flow]:
    """Return the flows of a loop's carries: of those used after it, or by what is used in it."""
    carried = list(out_flows[:num_carry])
    # What a carry feeds in one iteration, another carry may use in the next: a fixed point.
    while True:
        _, inside = flows(body, [*carried, *out_flows[num_carry:]])
        read = [inside.get(v, Flow.DEAD) for v in body.invars[num_consts:][:num_carry]]
        grown = [max(a, b) for a, b in zip(carried, read, strict=True)]
        if grown == carried:
            return carried
        carried = grown


def _is_floating(variable) -> bool:
    return jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int32), jnp.inexact)
