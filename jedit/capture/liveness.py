"""Which equations of a jaxpr matter to its outputs: what only dead code reads is not used."""

from collections import Counter

from jax.extend import core as jex_core

from jedit.capture import versions
from jedit.capture.versions import inner_jaxprs


def live_equations(jaxpr, live_out: list[bool]) -> tuple[list[bool], list[bool]]:
    """Flags of the equations and of the inputs that some live output, or an effect, depends on."""
    needed = {
        v
        for v, is_live in zip(jaxpr.outvars, live_out, strict=True)
        if is_live and not isinstance(v, jex_core.Literal)
    }
    live = [False] * len(jaxpr.eqns)
    for i in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[i]
        outs = [v in needed for v in eqn.outvars]
        if not any(outs) and not eqn.effects:
            continue
        live[i] = True
        reads = [True] * len(eqn.invars)
        if eqn.primitive.name in versions.INLINED:
            _, reads = live_equations(inner_jaxprs(eqn)[0].jaxpr, outs)
        needed.update(
            v
            for v, is_read in zip(eqn.invars, reads, strict=True)
            if is_read and not isinstance(v, jex_core.Literal)
        )
    return live, [v in needed for v in jaxpr.invars]


def use_counts(jaxpr, live: list[bool], live_out: list[bool]) -> Counter:
    """How often each variable is read by live equations and live outputs."""
    counts: Counter = Counter()
    for eqn, is_live in zip(jaxpr.eqns, live, strict=True):
        if is_live:
            counts.update(v for v in eqn.invars if not isinstance(v, jex_core.Literal))
    counts.update(
        v
        for v, is_live in zip(jaxpr.outvars, live_out, strict=True)
        if is_live and not isinstance(v, jex_core.Literal)
    )
    return counts
