"""Walk a jaxpr once, follow every parameter, and decide which equations are sites.

Nothing is computed here. The result is the list of drafts of sites, the reasons why other
parameters have none, and a `Plan` that says, equation by equation, what has to be tapped.
"""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from jedit.capture import versions
from jedit.capture.interpreter import Plan, Tap
from jedit.capture.liveness import live_equations, use_counts
from jedit.capture.provenance import Provenance
from jedit.capture.recognize import Draft, Scope, View, ints, recognize
from jedit.capture.source import source_line
from jedit.capture.versions import inner_jaxprs, rebind, scan_layout

REASONS = {
    **dict.fromkeys(versions.CUSTOM_RULE, "enters a function with a custom derivative rule"),
    "while": "enters a `while` loop, which has no reverse mode",
}


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known about one variable: its number (equal numbers, equal arrays) and its origin."""

    number: Any
    on_data: bool = False
    on_params: bool = False
    origin: Provenance | None = None
    constant: np.ndarray | None = None
    view: View | None = None


class Walker:
    """Carries what a walk finds: site drafts, refusals, fresh numbers."""

    def __init__(self) -> None:
        self.drafts: list[Draft] = []
        self.refused: dict[str, str] = {}
        self.stopped: set[str] = set()
        self.num_branches = 0
        self._records: dict[Any, int] = {}
        self._fresh = 0

    def fresh(self) -> tuple:
        """A number that no other value has."""
        self._fresh += 1
        return ("new", self._fresh)

    def record(self, number: Any) -> int:
        """The record of the activation with that number."""
        return self._records.setdefault(number, len(self._records))

    def refuse(self, origin: Provenance | None, reason: str, scope: Scope, eqn=None) -> None:
        """Note why a parameter cannot be covered, and in which line; the first reason stays."""
        if origin is not None and origin.path not in self.refused:
            where = scope.source if eqn is None else source_line(eqn, scope.source)
            self.refused[origin.path] = reason + (f" ({where})" if where else "")

    def resolve(self, selected: list[str]) -> list[Draft]:
        """Settle which biases belong to which weights, and drop what is not wholly covered."""
        users: dict[str, list[Draft]] = {}
        for draft in self.drafts:
            users.setdefault(draft.site.path, []).append(draft)

        def is_attached(bias: Draft) -> bool:
            if bias.offer is None:
                return False
            host = bias.offer.host
            if {host.site.path, bias.site.path} & set(self.refused):
                return False
            hosts, biases = users[host.site.path], users[bias.site.path]
            offers = [b.offer for b in biases if b.offer is not None]
            return (
                len({(h.site.weight, h.site.kind) for h in hosts}) == 1
                and len({offer.row for offer in offers}) == 1
                and len(offers) == len(biases) == len(hosts)
                and {id(offer.host) for offer in offers} == {id(h) for h in hosts}
            )

        attached = [draft for draft in self.drafts if is_attached(draft)]
        for offer in [draft.offer for draft in attached if draft.offer is not None]:
            offer.host.site = offer.to_site()
        kept = [d for d in self.drafts if d not in attached and d.site.path not in self.refused]
        for path in selected:
            if path not in users and path not in self.refused:
                is_stopped = path in self.stopped
                self.refused[path] = (
                    "enters only where no gradient flows (stop_gradient, comparisons)"
                    if is_stopped
                    else "is not used by apply"
                )
        return kept

    def walk(
        self, jaxpr, consts, invals: list[Value], scope: Scope, live_out: list[bool]
    ) -> tuple[list[Value], Plan]:
        """Follow values through one jaxpr; returns its outputs' values and the plan for it."""
        env: dict[Any, Value] = {}
        live, _ = live_equations(jaxpr, live_out)
        uses = use_counts(jaxpr, live, live_out)

        def read(atom) -> Value:
            if isinstance(atom, jex_core.Literal):
                return Value(self.fresh(), constant=_known_scalar(atom.val))
            return env.get(atom) or Value(self.fresh())  # what is dead is not followed

        for variable, value in zip(jaxpr.invars, invals, strict=True):
            env[variable] = value
        for variable, const in zip(jaxpr.constvars, consts, strict=True):
            env[variable] = Value(self.fresh(), constant=_known_scalar(const))
        plan = Plan()
        for i, eqn in enumerate(jaxpr.eqns):
            if not live[i]:
                continue
            values = [read(atom) for atom in eqn.invars]
            values = _without_shared_views(values, eqn.invars, uses)
            outs = self._equation(i, eqn, values, scope, plan, uses)
            for variable, value in zip(eqn.outvars, outs, strict=True):
                env[variable] = value
        outs = [read(atom) for atom in jaxpr.outvars]
        return _without_shared_views(outs, jaxpr.outvars, uses), plan

    def _equation(self, i, eqn, values, scope, plan, uses) -> list[Value]:
        name = eqn.primitive.name
        if inner_jaxprs(eqn):
            scope = scope.called_from(eqn)
        live_out = [uses.get(v, 0) > 0 for v in eqn.outvars]
        if name in versions.INLINED:
            jaxpr = inner_jaxprs(eqn)[0]
            outs, inner = self.walk(jaxpr.jaxpr, jaxpr.consts, values, scope, live_out)
            if inner:
                plan.inner[i] = (inner,)
            return outs
        if name == "scan":
            return self._scan(i, eqn, values, scope, plan, live_out)
        if name == "cond":
            return self._cond(i, eqn, values, scope, plan, live_out)
        on_data = any(v.on_data for v in values)
        on_params = any(v.on_params for v in values)
        constant = self._fold(eqn, values)
        entering = {v.origin.path for v in values if v.origin is not None}
        is_flat = not any(_is_floating(v) for v in eqn.outvars)
        if name in versions.NO_GRADIENT or (entering and is_flat):
            self.stopped.update(entering)
            return [Value(self.fresh(), on_data, on_params, constant=constant) for _ in eqn.outvars]
        if name in versions.IDENTITY and len(values) == len(eqn.outvars):
            return list(values)
        if name == "split":
            return self._split(eqn, values[0], scope)
        folded = self._structure(eqn, values)
        if folded is not None:
            return [folded]
        found = recognize(eqn, values, scope)
        if isinstance(found, Draft):
            reads, kept = found.reads, None
            if reads is not None:
                kept = self.record((scope.key, values[reads].number)), reads
                found.site = dataclasses.replace(found.site, record=kept[0])
            found.tap = len(self.drafts)
            self.drafts.append(found)
            plan.taps.setdefault(i, []).append(Tap(found.tap, kept))
            for k, value in enumerate(values):
                if k not in found.parameters and k != reads:
                    self.refuse(value.origin, f"enters `{name}`", scope, eqn)
                if k == reads:
                    self.refuse(value.origin, "is used as an activation", scope, eqn)
            out = Value(self.fresh(), on_data, True, view=found.view)
            return [out]
        if isinstance(found, Provenance):
            return [Value(self.fresh(), on_data, on_params, origin=found)]
        for value in values:
            reason = REASONS.get(name) or (found if isinstance(found, str) else f"enters `{name}`")
            self.refuse(value.origin, reason, scope, eqn)
        return [Value(self.fresh(), on_data, on_params, constant=constant) for _ in eqn.outvars]

    def _structure(self, eqn, values) -> Value | None:
        """A relayout or a cast of one value: same number for equal inputs, origin and view kept."""
        name = eqn.primitive.name
        value, params = values[0] if values else None, eqn.params
        if value is None or len(eqn.outvars) != 1:
            return None
        shape = eqn.outvars[0].aval.shape
        origin = value.origin
        if name in versions.CAST:
            arguments = (str(eqn.outvars[0].aval.dtype), *map(str, params.values()))
            if name == "convert_element_type" and _same_dtype(eqn.outvars[0], eqn.invars[0]):
                return value
        elif name == "transpose":
            arguments = (ints(params["permutation"]),)
            origin = origin and origin.transposed(arguments[0])
        elif name in ("reshape", "squeeze", "expand_dims"):
            order = params.get("dimensions") if name == "reshape" else None
            arguments = (shape, order)
            if order is not None:  # vmap writes a transpose into the reshape
                origin = origin and origin.transposed(ints(order))
            origin = origin and origin.reshaped(shape)
        elif name == "broadcast_in_dim" and len(values) == 1:
            dims = ints(params["broadcast_dimensions"])
            arguments = (shape, dims)
            origin = origin and origin.broadcast(shape, dims)
        elif name == "slice":
            strides = params["strides"] and ints(params["strides"])
            arguments = (ints(params["start_indices"]), ints(params["limit_indices"]), strides)
            origin = origin and origin.sliced(*arguments)
        else:
            return None
        if value.origin is not None and origin is None:
            return None
        view = value.view and value.view.after(name, eqn)
        # a known scalar stays known when it is broadcast: all entries are equal
        constant = value.constant
        if constant is not None and name in versions.CAST:
            constant = constant.astype(eqn.outvars[0].aval.dtype)
        return Value(
            (name, arguments, value.number), value.on_data, value.on_params, origin, constant, view
        )

    def _split(self, eqn, value: Value, scope: Scope) -> list[Value]:
        """Several slices along one axis, as `slice` would cut them."""
        axis, shape = eqn.params["axis"], eqn.invars[0].aval.shape
        outs, end = [], 0
        for size in eqn.params["sizes"]:
            begin, end = end, end + size
            start = tuple(begin if i == axis else 0 for i in range(len(shape)))
            limit = tuple(end if i == axis else n for i, n in enumerate(shape))
            origin = value.origin and value.origin.sliced(start, limit, None)
            if origin is None:
                self.refuse(value.origin, "is split after a broadcast", scope, eqn)
            number = ("slice", (start, limit, None), value.number)
            outs.append(Value(number, value.on_data, value.on_params, origin, value.constant))
        return outs

    @staticmethod
    def _fold(eqn, values) -> np.ndarray | None:
        """The value of a scalar equation whose inputs are known."""
        if len(eqn.outvars) != 1 or eqn.outvars[0].aval.shape != () or eqn.effects:
            return None
        if not values or any(v.constant is None for v in values) or inner_jaxprs(eqn):
            return None
        if any(atom.aval.shape != () for atom in eqn.invars):
            return None
        with jax.ensure_compile_time_eval():
            return _known_scalar(rebind(eqn, [v.constant for v in values])[0])

    def _scan(self, i, eqn, values, scope, plan, live_out) -> list[Value]:
        body = eqn.params["jaxpr"]
        num_consts, num_carry = scan_layout(eqn)
        on_data = any(v.on_data for v in values)
        on_params = any(v.on_params for v in values)
        inside = scope.scan(eqn.params["length"], self.fresh())
        carried_live = _carry_liveness(body.jaxpr, num_consts, num_carry, live_out)
        invals = []
        unchanged = [
            body.jaxpr.outvars[k] is body.jaxpr.invars[num_consts + k] for k in range(num_carry)
        ]
        for k, value in enumerate(values):
            carry = k - num_consts
            if carry >= num_carry:
                origin = value.origin and value.origin.scanned(len(scope.lengths))
                number, constant = (inside.key, value.number, "slice"), value.constant
                new = Value(number, value.on_data, value.on_params, origin, constant)
            elif carry >= 0 and not unchanged[carry]:
                if carried_live[carry]:
                    self.refuse(value.origin, "is changed by a loop that carries it", scope)
                new = Value(self.fresh(), on_data, on_params)
            else:
                number = (inside.key, value.number)
                new = dataclasses.replace(value, number=number, view=None)
            invals.append(new)
        inner_live = [*carried_live, *live_out[num_carry:]]
        outs, inner = self.walk(body.jaxpr, body.consts, invals, inside, inner_live)
        if inner:
            plan.inner[i] = (inner,)
        results = []
        for k, out in enumerate(outs):
            if k < num_carry and unchanged[k]:
                results.append(values[num_consts + k])
                continue
            if inner_live[k]:
                self.refuse(out.origin, "is returned by a loop's body", scope)
            results.append(Value(self.fresh(), on_data, on_params))
        return results

    def _cond(self, i, eqn, values, scope, plan, live_out) -> list[Value]:
        on_data = any(v.on_data for v in values)
        on_params = any(v.on_params for v in values)
        self.refuse(values[0].origin, "decides a branch of `cond`", scope)
        plans = []
        for branch in eqn.params["branches"]:
            inside = scope.branched(self.fresh(), self.num_branches)
            self.num_branches += 1
            invals = [
                dataclasses.replace(v, number=(inside.key, v.number), view=None) for v in values[1:]
            ]
            outs, inner = self.walk(branch.jaxpr, branch.consts, invals, inside, live_out)
            inner.branch = inside.branch
            plans.append(inner)
            for out in outs:
                self.refuse(out.origin, "is returned by a branch of `cond`", scope)
        if any(plans):
            plan.inner[i] = tuple(plans)
        return [Value(self.fresh(), on_data, on_params) for _ in eqn.outvars]


def _without_shared_views(values: list[Value], atoms, uses) -> list[Value]:
    """An output that is read more than once is not simply "its bias added": it loses its view."""
    return [
        dataclasses.replace(v, view=None) if v.view is not None and uses.get(a, 0) != 1 else v
        for v, a in zip(values, atoms, strict=True)
    ]


def _known_scalar(value) -> np.ndarray | None:
    """A number known while tracing, as NumPy holds it."""
    if isinstance(value, jax.core.Tracer) or np.ndim(value) != 0:
        return None
    dtype = getattr(value, "dtype", np.asarray(0.0).dtype)
    is_number = jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)
    return np.asarray(value) if is_number else None


def _is_floating(variable) -> bool:
    return jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int32), jnp.inexact)


def _same_dtype(a, b) -> bool:
    return a.aval.dtype == b.aval.dtype


def _carry_liveness(body, num_consts: int, num_carry: int, live_out: list[bool]) -> list[bool]:
    """Which carries matter: those used after the loop, or by what is used."""
    carried = list(live_out[:num_carry])
    while True:
        _, live_in = live_equations(body, [*carried, *live_out[num_carry:]])
        grown = [a or b for a, b in zip(carried, live_in[num_consts:][:num_carry], strict=True)]
        if grown == carried:
            return carried
        carried = grown
