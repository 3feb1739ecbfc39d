"""Evaluate a jaxpr again, with probes at its sites and the activations that enter them kept.

How a JAX version re-binds an equation stands in `versions`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from jedit.core.devices import on_auto, typed_like
from jedit.tracing import versions
from jedit.tracing.versions import inner_jaxprs, rebind, scan_layout


class Step(NamedTuple):
    """One step in the making of a parameter's constant multiplier: a relayout, or a product.

    Attributes:
        eqn: the equation that relays the multiplier out, or multiplies it.
        operand: which of its operands multiplies, or divides; None for a relayout.
    """

    eqn: Any
    operand: int | None


class Kept(NamedTuple):
    """The operand, multiplier or product of both that a tap keeps, and its record's number."""

    record: int
    operand: int | None
    factor: tuple[Step, ...] = ()


class Tap(NamedTuple):
    """An order at one equation: add a probe of this shape and dtype to its output; keep inputs."""

    probe: int
    kept: tuple[Kept, ...]
    shape: tuple[int, ...]
    dtype: str


class Replacement(NamedTuple):
    """A probe that is added, and puts `value` in the place of the output where `mask` holds."""

    added: Any
    mask: Any
    value: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["given"], meta_fields=["change"])
@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A probe that computes the output anew: `change(output, given)`; None leaves it as it is.

    In a scan `given` is sliced as probes are, and the function sees one iteration's output.
    """

    change: Callable | None = None
    given: Any = None


@dataclasses.dataclass
class Plan:
    """A plan of what to do in one jaxpr: taps by equation, and plans of inner jaxprs with taps."""

    taps: dict[int, list[Tap]] = dataclasses.field(default_factory=dict)
    inner: dict[int, tuple["Plan", ...]] = dataclasses.field(default_factory=dict)
    branch: int | None = None

    def __bool__(self) -> bool:
        return bool(self.taps or self.inner)

    def restricted(self, probes: set[int]) -> "Plan":
        """Return the plan without the taps whose probe is not wanted."""
        taps = {i: [t for t in taps if t.probe in probes] for i, taps in self.taps.items()}
        inner = {i: tuple(p.restricted(probes) for p in plans) for i, plans in self.inner.items()}
        return Plan(
            {i: kept for i, kept in taps.items() if kept},
            {i: plans for i, plans in inner.items() if any(plans)},
            self.branch,
        )

    def probes(self) -> dict[int, Any]:
        """Return zeros for every probe."""
        return {tap.probe: jnp.zeros(tap.shape, tap.dtype) for tap in self.all_taps()}

    def all_taps(self) -> list[Tap]:
        """Return every tap, inner ones included."""
        mine = [tap for taps in self.taps.values() for tap in taps]
        plans = [plan for plans in self.inner.values() for plan in plans]
        return mine + [tap for plan in plans for tap in plan.all_taps()]


@dataclasses.dataclass
class Records:
    """The records of one pass: activations by record, whether branches ran, outputs by probe."""

    activations: dict[int, Any] = dataclasses.field(default_factory=dict)
    ran: dict[int, Any] = dataclasses.field(default_factory=dict)
    outputs: dict[int, Any] = dataclasses.field(default_factory=dict)
    known: frozenset[int] = frozenset()  # kept already by the code around this jaxpr
    is_watching: bool = False  # whether outputs are kept

    def inside(self, *, sees_arrays: bool = False) -> "Records":
        """Return fresh records for an inner jaxpr: a loop's, or one that sees the same arrays."""
        known = self.known | set(self.activations) if sees_arrays else frozenset()
        return Records(known=known, is_watching=self.is_watching)

    @property
    def tree(self) -> tuple[dict, dict, dict]:
        """Return the records as a pytree."""
        return self.activations, self.ran, self.outputs

    def update(self, tree: tuple[dict, dict, dict]) -> None:
        """Take in what an inner jaxpr kept."""
        for mine, theirs in zip(self.tree, tree, strict=True):
            mine.update(theirs)


def evaluate(jaxpr, consts, inputs, plan: Plan, probes: dict[int, Any], records: Records) -> list:
    """Return the jaxpr's outputs, probes put where `plan` says and activations put in `records`."""
    env: dict[Any, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

    env.update(zip(jaxpr.invars, inputs, strict=True))
    env.update(zip(jaxpr.constvars, consts, strict=True))
    for i, eqn in enumerate(jaxpr.eqns):
        ins = [read(atom) for atom in eqn.invars]
        if i in plan.inner:
            outs = _enter(eqn, ins, plan.inner[i], probes, records)
        else:
            outs = rebind(eqn, ins)
        for tap in plan.taps.get(i, ()):
            probe = probes[tap.probe]
            # In the equation's own context: the sum must see the mesh that the model set.
            with eqn.ctx.manager:
                if callable(probe):  # a change that is computed from what enters there
                    probe = probe(on_auto(_kept(tap.kept[0], ins, read)))
                for kept in tap.kept:
                    # Sites that read one activation have one record: it is kept once.
                    if kept.record not in {*records.known, *records.activations}:
                        records.activations[kept.record] = on_auto(_kept(kept, ins, read))
                if isinstance(probe, Rewrite):
                    if probe.change is not None:
                        changed = probe.change(on_auto(outs[0]), probe.given)
                        outs[0] = typed_like(changed, outs[0])
                elif isinstance(probe, Replacement):
                    added, mask, value = (typed_like(x, outs[0]) for x in probe)
                    outs[0] = jnp.where(mask, value, outs[0] + added)
                else:
                    outs[0] = outs[0] + typed_like(probe, outs[0])
            if records.is_watching:
                records.outputs[tap.probe] = on_auto(outs[0])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _kept(kept: Kept, ins: list, read: Callable) -> Any:
    """Return what is to be kept of an equation's operands."""
    factor = None
    for eqn, operand in kept.factor:
        if operand is None:
            factor = rebind(eqn, [factor])[0]
            continue
        by = jnp.broadcast_to(read(eqn.invars[operand]), eqn.outvars[0].aval.shape)
        # The multiplier may be of lower rank than the weight: here it gets the output's shape.
        by = 1 / by if eqn.primitive.name == "div" else by
        factor = by if factor is None else factor * by
    if kept.operand is None:
        return factor
    return ins[kept.operand] if factor is None else ins[kept.operand] * factor


def _enter(eqn, ins, plans, probes, records) -> list:
    """Evaluate an equation whose own jaxprs hold sites."""
    name = eqn.primitive.name
    if name == "scan":
        return _enter_scan(eqn, ins, plans[0], probes, records)
    if name == "cond":
        return _enter_cond(eqn, ins, plans, probes, records)
    jaxpr = inner_jaxprs(eqn)[0]
    if name in versions.REMAT:
        # Records leave `checkpoint` as results: put into the outer ones from its inside, its
        # tracers would leak.
        mine = _needed(plans[0], probes)

        def body(inputs, mine):
            kept = records.inside(sees_arrays=True)
            outs = evaluate(jaxpr.jaxpr, jaxpr.consts, inputs, plans[0], mine, kept)
            return outs, kept.tree

        remat: Callable = jax.checkpoint(
            body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"]
        )
        outs, kept = remat(ins, mine)
        records.update(kept)
        return outs
    return evaluate(jaxpr.jaxpr, jaxpr.consts, ins, plans[0], probes, records)


def _needed(plan: Plan, probes: dict[int, Any]) -> dict[int, Any]:
    return {tap.probe: probes[tap.probe] for tap in plan.all_taps()}


def _enter_scan(eqn, ins, plan, probes, records) -> list:
    params = eqn.params
    body = params["jaxpr"]
    num_consts, num_carry = scan_layout(eqn)
    consts, init = ins[:num_consts], ins[num_consts : num_consts + num_carry]

    # Probes go in as sliced inputs and activations come out as stacked outputs, so that each
    # iteration has its own: both get the loop's axis in front.
    def step(carry, sliced):
        xs, mine = sliced
        kept = records.inside()
        outs = evaluate(body.jaxpr, body.consts, [*consts, *carry, *xs], plan, mine, kept)
        return outs[:num_carry], (outs[num_carry:], kept.tree)

    carry, (ys, kept) = jax.lax.scan(
        step,
        init,
        (ins[num_consts + num_carry :], _needed(plan, probes)),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    records.update(kept)
    return [*carry, *ys]


def _enter_cond(eqn, ins, plans, probes, records) -> list:
    branches = eqn.params["branches"]
    index, operands = ins[0], ins[1:]
    mine = {tap.probe: probes[tap.probe] for plan in plans for tap in plan.all_taps()}

    def runner(k):
        def run(operands, mine):
            kept = records.inside()
            branch = branches[k]
            outs = evaluate(branch.jaxpr, branch.consts, operands, plans[k], mine, kept)
            if plans[k]:
                kept.ran[plans[k].branch] = jnp.ones((), jnp.float32)
            return outs, kept.tree

        return run

    # All branches of a switch must return one structure: what a branch does not keep is zero there,
    # and `ran` tells these zeros from data.
    shapes = [jax.eval_shape(runner(k), operands, mine)[1] for k in range(len(branches))]

    def padded(k):
        def run(operands, mine):
            outs, kept = runner(k)(operands, mine)
            for other in shapes:
                for mine_, theirs in zip(kept, other, strict=True):
                    for key, x in theirs.items():
                        if key not in mine_:
                            mine_[key] = jnp.zeros(x.shape, x.dtype)
            return outs, kept

        return run

    outs, kept = jax.lax.switch(index, [padded(k) for k in range(len(branches))], operands, mine)
    records.update(kept)
    return outs
