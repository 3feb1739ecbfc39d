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

from jedit.tracing import versions
from jedit.tracing.drafts import Draft, Scope, View
from jedit.tracing.interpreter import Kept, Plan, Step, Tap
from jedit.tracing.joined import Joined
from jedit.tracing.liveness import Flow, carry_flows, flows, use_counts
from jedit.tracing.provenance import Provenance
from jedit.tracing.recognize import BY_ARRAY, Multiplied, ints, recognize
from jedit.tracing.source import source_line
from jedit.tracing.versions import inner_jaxprs, rebind, scan_layout

COMPLEX = "meets complex numbers; only real arithmetic is covered"


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known about one variable of the jaxpr that is walked.

    Attributes:
        number: a hashable value; variables of equal numbers hold equal arrays.
        on_data: whether it depends on the inputs.
        on_params: whether it depends on parameters.
        origin: the parameter that it is, or several of them joined.
        constant: the number that it is, where that is known.
        view: how a site's output was relaid to become it; None where it is none.
        factor: the steps that made the array by which the parameter was multiplied, all in this
            very jaxpr; empty where it was not.
    """

    number: Any
    on_data: bool = False
    on_params: bool = False
    origin: Provenance | Joined | None = None
    constant: np.ndarray | None = None
    view: View | None = None
    factor: tuple[Step, ...] = ()


class Walker:
    """The state of a walk: site drafts, refusals, and the numbers given out so far."""

    def __init__(self) -> None:
        self.drafts: list[Draft] = []
        self.refused: dict[str, str] = {}
        self.stopped: set[str] = set()
        self.num_branches = 0
        self._records: dict[Any, int] = {}
        self._fresh = 0
        self._num_probes = 0

    def fresh(self) -> tuple:
        """Return a number that no other value has."""
        self._fresh += 1
        return ("new", self._fresh)

    def record(self, number: Any) -> int:
        """Return the record of the activation with that number."""
        return self._records.setdefault(number, len(self._records))

    def refuse(self, origin: Provenance | Joined | None, reason, scope: Scope, eqn=None) -> None:
        """Note why a parameter cannot be covered, and in which line; the first reason stays."""
        for path in () if origin is None else origin.paths:
            if path not in self.refused:
                where = scope.source if eqn is None else source_line(eqn, scope.source)
                self.refused[path] = reason + (f" ({where})" if where else "")

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
            # One weight and one bias must meet in the same way wherever either is used: a bias with
            # one use elsewhere would have a gradient that the joint matrix does not hold.
            hosts, biases = users[host.site.path], users[bias.site.path]
            offers = [b.offer for b in biases if b.offer is not None]
            return (
                len({(h.site.weight, h.site.kind) for h in hosts}) == 1
                and len({offer.row for offer in offers}) == 1
                and len(offers) == len(biases) == len(hosts)
                and {id(offer.host) for offer in offers} == {id(h) for h in hosts}
            )

        attached = [draft for draft in self.drafts if is_attached(draft)]
        # Only now: `is_attached` compares the weights as they are without their biases.
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
        self, jaxpr, consts, invals: list[Value], scope: Scope, out_flows: list[Flow]
    ) -> tuple[list[Value], Plan]:
        """Follow values through one jaxpr, and return its outputs' values and the plan for it."""
        env: dict[Any, Value] = {}
        found, needed = flows(jaxpr, out_flows)
        uses = use_counts(jaxpr, found, out_flows)

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
            if found[i] == Flow.DEAD:
                continue
            values = [read(atom) for atom in eqn.invars]
            # A parameter through which no gradient flows is a number like others.
            if found[i] == Flow.VALUE:
                values = self._stopped(values)
            values = _without_shared_views(values, eqn.invars, uses)
            wanted = [needed.get(v, Flow.DEAD) for v in eqn.outvars]
            outs = self._equation(i, eqn, values, scope, plan, wanted)
            for variable, value in zip(eqn.outvars, outs, strict=True):
                env[variable] = value
        outs = [read(atom) for atom in jaxpr.outvars]
        return _without_shared_views(outs, jaxpr.outvars, uses), plan

    def _stopped(self, values: list[Value]) -> list[Value]:
        """Forget which values are parameters: where no gradient flows they are mere numbers."""
        for value in values:
            self.stopped.update(() if value.origin is None else value.origin.paths)
        return [dataclasses.replace(v, origin=None, view=None, factor=()) for v in values]

    def _without_factors(self, values: list[Value], scope: Scope) -> list[Value]:
        """Refuse to follow what was multiplied by an array into, or out of, another jaxpr."""
        for value in values:
            if value.factor:
                self.refuse(value.origin, BY_ARRAY, scope, value.factor[0].eqn)
        return [dataclasses.replace(v, origin=None, factor=()) if v.factor else v for v in values]

    def _equation(self, i, eqn, values, scope, plan, wanted) -> list[Value]:
        name = eqn.primitive.name
        if inner_jaxprs(eqn):
            values = self._without_factors(values, scope)
            scope = scope.called_from(eqn)
        if name in versions.INLINED:
            jaxpr = inner_jaxprs(eqn)[0]
            outs, inner = self.walk(jaxpr.jaxpr, jaxpr.consts, values, scope, wanted)
            if inner:
                plan.inner[i] = (inner,)
            return self._without_factors(outs, scope)
        if name == "scan":
            return self._scan(i, eqn, values, scope, plan, wanted)
        if name == "cond":
            return self._cond(i, eqn, values, scope, plan, wanted)
        on_data = any(v.on_data for v in values)
        on_params = any(v.on_params for v in values)
        constant = self._fold(eqn, values)
        unknown = [Value(self.fresh(), on_data, on_params, constant=constant) for _ in eqn.outvars]
        if name in versions.IDENTITY and len(values) == len(eqn.outvars):
            return list(values)
        if any(_is_complex(v) for v in eqn.outvars) and not inner_jaxprs(eqn):
            for value in values:
                self.refuse(value.origin, COMPLEX, scope, eqn)
            return unknown
        if name in ("split", "unstack"):
            return self._split(eqn, values[0], scope)
        folded = self._structure(eqn, values)
        if folded is not None:
            return [folded]
        found = recognize(eqn, values, scope)
        if isinstance(found, list):
            self._tap(i, eqn, values, scope, plan, found)
            return [Value(self.fresh(), on_data, True, view=found[0].view if found else None)]
        factor = next((v.factor for v in values if v.origin is not None), ())
        if isinstance(found, Multiplied):
            found, factor = found.origin, (*factor, found.step)
        if isinstance(found, Provenance | Joined):
            return [Value(self.fresh(), on_data, on_params, origin=found, factor=factor)]
        for value in values:
            at = value.factor[0].eqn if value.factor and found == BY_ARRAY else eqn
            self.refuse(value.origin, found or f"enters `{name}`", scope, at)
        return unknown

    def _tap(self, i, eqn, values, scope, plan, drafts: list[Draft]) -> None:
        """Take in the sites of one equation: a probe, and what they read of its operands."""
        probe, reads = self._num_probes, {draft.reads for draft in drafts}
        self._num_probes += 1
        kept = []
        for draft in drafts:
            factor = next((v.factor for v in values if v.origin is not None), ())
            record = None
            if draft.site.kind != "bias":
                number = () if draft.reads is None else values[draft.reads].number
                # Equal numbers are equal arrays only within one jaxpr: another iteration, or
                # branch, has others. A product with a multiplier is nobody else's activation.
                key = (scope.key, number) if not factor else self.fresh()
                record = self.record(key)
                kept.append(Kept(record, draft.reads, factor))
            draft.site = dataclasses.replace(draft.site, record=record, probe=probe)
            if factor:  # what is kept is the product, of the output's shape
                draft.site = dataclasses.replace(draft.site, input_shape=draft.site.output_shape)
        for k, value in enumerate(values):
            if k in reads:
                self.refuse(value.origin, "is used as an activation", scope, eqn)
        self.drafts += drafts
        out = eqn.outvars[0].aval
        shape = (*scope.lengths, *out.shape)
        tap = Tap(probe, tuple(dict.fromkeys(kept)), shape, str(out.dtype))
        plan.taps.setdefault(i, []).append(tap)

    def _structure(self, eqn, values) -> Value | None:
        """Follow a relayout or a cast: equal inputs have equal numbers; origin and view stay."""
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
        elif name == "tile":
            arguments = (ints(params["reps"]),)
            sizes = zip(eqn.invars[0].aval.shape, arguments[0], strict=True)
            if any(n != 1 and rep != 1 for n, rep in sizes):
                origin = None
            origin = origin and origin.broadcast(shape, tuple(range(len(shape))))
        elif name == "slice":
            strides = params["strides"] and ints(params["strides"])
            arguments = (ints(params["start_indices"]), ints(params["limit_indices"]), strides)
            origin = origin and origin.sliced(*arguments)
        else:
            return None
        # A parameter that cannot be followed is `recognize`'s to refuse, with a reason.
        if value.origin is not None and origin is None:
            return None
        if origin is not None and not origin.paths:
            origin = None  # a slice of joined parameters beside all of them
        view = value.view and value.view.after(name, eqn)
        factor = (*value.factor, Step(eqn, None)) if value.factor else ()
        # a known scalar stays known when it is broadcast: all entries are equal
        constant = value.constant
        if constant is not None and name in versions.CAST:
            constant = constant.astype(eqn.outvars[0].aval.dtype)
        number = (name, arguments, value.number)
        return Value(number, value.on_data, value.on_params, origin, constant, view, factor)

    def _split(self, eqn, value: Value, scope: Scope) -> list[Value]:
        """Cut several slices along one axis, numbered as `slice` (and `squeeze`) number theirs."""
        [value] = self._without_factors([value], scope)
        axis, shape = eqn.params["axis"], eqn.invars[0].aval.shape
        outs, end = [], 0
        for out, size in zip(eqn.outvars, eqn.params.get("sizes", (1,) * shape[axis]), strict=True):
            begin, end = end, end + size
            start = tuple(begin if i == axis else 0 for i in range(len(shape)))
            limit = tuple(end if i == axis else n for i, n in enumerate(shape))
            origin = value.origin and value.origin.sliced(start, limit, None)
            origin = origin and origin.reshaped(out.aval.shape)
            if origin is None:
                self.refuse(value.origin, "is split after a broadcast", scope, eqn)
            elif not origin.paths:
                origin = None
            # Written as `slice` writes it, so that both ways of cutting share one record.
            number = ("slice", (start, limit, None), value.number)
            if out.aval.ndim < len(shape):
                number = ("squeeze", (out.aval.shape, None), number)
            outs.append(Value(number, value.on_data, value.on_params, origin, value.constant))
        return outs

    @staticmethod
    def _fold(eqn, values) -> np.ndarray | None:
        """Return the value of a scalar equation whose inputs are known."""
        if len(eqn.outvars) != 1 or eqn.outvars[0].aval.shape != () or eqn.effects:
            return None
        if not values or any(v.constant is None for v in values) or inner_jaxprs(eqn):
            return None
        if any(atom.aval.shape != () for atom in eqn.invars):
            return None
        # The walk may itself run under a trace, where the scalar would become a tracer.
        with jax.ensure_compile_time_eval():
            return _known_scalar(rebind(eqn, [v.constant for v in values])[0])

    def _scan(self, i, eqn, values, scope, plan, wanted) -> list[Value]:
        body = eqn.params["jaxpr"]
        num_consts, num_carry = scan_layout(eqn)
        on_data = any(v.on_data for v in values)
        on_params = any(v.on_params for v in values)
        # A fresh key for the body: equal numbers inside are equal arrays only there.
        inside = scope.scan(eqn.params["length"], self.fresh())
        carried = carry_flows(body.jaxpr, num_consts, num_carry, wanted)
        invals = []
        # A carry that the body hands on as it is (weights, in some libraries) is like a constant.
        unchanged = [
            body.jaxpr.outvars[k] is body.jaxpr.invars[num_consts + k] for k in range(num_carry)
        ]
        for k, value in enumerate(values):
            carry = k - num_consts
            if carry >= num_carry:
                origin = value.origin and value.origin.scanned(len(scope.lengths))
                # All iterations' slices have one number: they are recorded as one stacked array.
                number, constant = (inside.key, value.number, "slice"), value.constant
                new = Value(number, value.on_data, value.on_params, origin, constant)
            elif carry >= 0 and not unchanged[carry]:
                if carried[carry] == Flow.GRADIENT:
                    self.refuse(value.origin, "is changed by a loop that carries it", scope)
                new = Value(self.fresh(), on_data, on_params)
            else:
                number = (inside.key, value.number)
                new = dataclasses.replace(value, number=number, view=None)
            invals.append(new)
        inner_flows = [*carried, *wanted[num_carry:]]
        outs, inner = self.walk(body.jaxpr, body.consts, invals, inside, inner_flows)
        if inner:
            plan.inner[i] = (inner,)
        results = []
        for k, out in enumerate(outs):
            if k < num_carry and unchanged[k]:
                results.append(values[num_consts + k])
                continue
            if inner_flows[k] == Flow.GRADIENT:
                self.refuse(out.origin, "is returned by a loop's body", scope)
            results.append(Value(self.fresh(), on_data, on_params))
        return results

    def _cond(self, i, eqn, values, scope, plan, wanted) -> list[Value]:
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
            outs, inner = self.walk(branch.jaxpr, branch.consts, invals, inside, wanted)
            inner.branch = inside.branch
            plans.append(inner)
            for out, flow in zip(outs, wanted, strict=True):
                if flow == Flow.GRADIENT:
                    self.refuse(out.origin, "is returned by a branch of `cond`", scope)
        if any(plans):
            plan.inner[i] = tuple(plans)
        return [Value(self.fresh(), on_data, on_params) for _ in eqn.outvars]


def _without_shared_views(values: list[Value], atoms, uses) -> list[Value]:
    """Drop the views of outputs that are read more than once: more than a bias looks at them."""
    return [
        dataclasses.replace(v, view=None) if v.view is not None and uses.get(a, 0) != 1 else v
        for v, a in zip(values, atoms, strict=True)
    ]


def _known_scalar(value) -> np.ndarray | None:
    """Return a number known while tracing, as NumPy holds it."""
    if isinstance(value, jax.core.Tracer) or np.ndim(value) != 0:
        return None
    dtype = getattr(value, "dtype", np.asarray(0.0).dtype)
    is_number = jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)
    return np.asarray(value) if is_number else None


def _is_complex(variable) -> bool:
    return jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int32), jnp.complexfloating)


def _same_dtype(a, b) -> bool:
    return a.aval.dtype == b.aval.dtype
