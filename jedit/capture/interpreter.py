"""Evaluate a jaxpr again, with probes added at its sites and the activations that enter them kept.

`rebind` is the only place that depends on how a JAX version re-binds an equation.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core


@dataclasses.dataclass(frozen=True)
class Tap:
    """At this equation: add probe `probe` to the output, keep operand `operand` as record `record`."""

    probe: int
    record: int | None
    operand: int | None


@dataclasses.dataclass
class Plan:
    """What to do in one jaxpr: taps by equation, and plans of the inner jaxprs that hold some."""

    taps: dict[int, list[Tap]] = dataclasses.field(default_factory=dict)
    inner: dict[int, tuple["Plan", ...]] = dataclasses.field(default_factory=dict)
    branch: int | None = None

    def __bool__(self) -> bool:
        return bool(self.taps or self.inner)

    def restricted(self, probes: set[int]) -> "Plan":
        """Without the taps whose probe is not wanted."""
        taps = {i: [t for t in taps if t.probe in probes] for i, taps in self.taps.items()}
        inner = {i: tuple(p.restricted(probes) for p in plans) for i, plans in self.inner.items()}
        return Plan(
            {i: kept for i, kept in taps.items() if kept},
            {i: plans for i, plans in inner.items() if any(plans)},
            self.branch,
        )

    def all_taps(self) -> Iterator[Tap]:
        """Every tap, inner ones included."""
        for taps in self.taps.values():
            yield from taps
        for plans in self.inner.values():
            for plan in plans:
                yield from plan.all_taps()

    def all_branches(self) -> Iterator[int]:
        """Every branch that holds a tap."""
        if self.branch is not None and self:
            yield self.branch
        for plans in self.inner.values():
            for plan in plans:
                yield from plan.all_branches()


@dataclasses.dataclass
class Records:
    """What one pass keeps: activations by record, and for each branch whether it ran."""

    activations: dict[int, Any] = dataclasses.field(default_factory=dict)
    ran: dict[int, Any] = dataclasses.field(default_factory=dict)
    known: frozenset[int] = frozenset()  # kept already by the code around this jaxpr

    def inside(self) -> "Records":
        """Fresh records for a jaxpr of its own that sees the same arrays."""
        return Records(known=self.known | set(self.activations))

    @property
    def tree(self) -> tuple[dict, dict]:
        """The records as a pytree."""
        return self.activations, self.ran

    def update(self, tree: tuple[dict, dict]) -> None:
        """Take in what an inner jaxpr kept."""
        self.activations.update(tree[0])
        self.ran.update(tree[1])


def inner_jaxprs(eqn) -> list[jex_core.ClosedJaxpr]:
    """The jaxprs in an equation's parameters, closed."""
    found = []
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, jex_core.ClosedJaxpr):
                found.append(x)
            elif isinstance(x, jex_core.Jaxpr):
                found.append(jex_core.ClosedJaxpr(x, ()))
    return found


def rebind(eqn, inputs: list) -> list:
    """Evaluate one equation on other inputs, its custom derivative rules and context kept."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        if isinstance(bound, dict):  # jax >= 0.10
            outs = eqn.primitive.bind(*inputs, **bound)
        elif isinstance(bound, tuple) and len(bound) == 2:  # a pair (functions, parameters)
            outs = eqn.primitive.bind(*bound[0], *inputs, **bound[1])
        else:
            raise NotImplementedError(
                f"jax {jax.__version__} re-binds `{eqn.primitive.name}` in a way this version of "
                "jedit does not know; jedit supports jax >= 0.10"
            )
    return list(outs) if eqn.primitive.multiple_results else [outs]


def evaluate(jaxpr, consts, inputs, plan: Plan, probes: dict[int, Any], records: Records) -> list:
    """The jaxpr's outputs, with `probes` added where `plan` says and activations put in `records`."""
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
            if tap.record is not None and tap.record not in records.known:
                records.activations.setdefault(tap.record, ins[tap.operand])
            outs[0] = outs[0] + probes[tap.probe]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _enter(eqn, ins, plans, probes, records) -> list:
    """Evaluate an equation whose own jaxprs hold sites."""
    name = eqn.primitive.name
    if name == "scan":
        return _enter_scan(eqn, ins, plans[0], probes, records)
    if name == "cond":
        return _enter_cond(eqn, ins, plans, probes, records)
    jaxpr = inner_jaxprs(eqn)[0]
    if name in ("remat", "remat2", "checkpoint"):
        mine = _needed(plans[0], probes)

        def body(inputs, mine):
            kept = records.inside()
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
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, init = ins[:num_consts], ins[num_consts : num_consts + num_carry]

    def step(carry, sliced):
        xs, mine = sliced
        kept = Records()
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
            kept = Records()
            branch = branches[k]
            outs = evaluate(branch.jaxpr, branch.consts, operands, plans[k], mine, kept)
            if plans[k]:
                kept.ran[plans[k].branch] = jnp.ones((), jnp.float32)
            return outs, kept.tree

        return run

    shapes = [jax.eval_shape(runner(k), operands, mine)[1] for k in range(len(branches))]

    def padded(k):
        def run(operands, mine):
            outs, (activations, ran) = runner(k)(operands, mine)
            for other in shapes:
                for mine_, theirs in zip((activations, ran), other, strict=True):
                    for key, x in theirs.items():
                        if key not in mine_:
                            mine_[key] = jnp.zeros(x.shape, x.dtype)
            return outs, (activations, ran)

        return run

    outs, kept = jax.lax.switch(index, [padded(k) for k in range(len(branches))], operands, mine)
    records.update(kept)
    return outs
