"""Walk a jaxpr once, follow every parameter, and decide which equations are sites.

Nothing is computed here. The result is the list of sites, the reasons why other parameters have
none, and a `Plan` that says, equation by equation, what the interpreter has to tap.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jaxtyping import PyTree

from jedit.capture.interpreter import Plan, Tap, inner_jaxprs
from jedit.capture.liveness import live_equations, use_counts
from jedit.capture.provenance import Provenance
from jedit.capture.recognize import Draft, Scope, View, recognize
from jedit.capture.sites import Site, Sites
from jedit.capture.source import source_line

INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
NO_GRADIENT = ("stop_gradient",)
CAST = ("convert_element_type", "reduce_precision")
IDENTITY = ("copy", "copy_p", "sharding_constraint", "optimization_barrier", "pvary")
REASONS = {
    "custom_jvp_call": "enters a function with a custom derivative rule",
    "custom_vjp_call": "enters a function with a custom derivative rule",
    "custom_vjp_call_jaxpr": "enters a function with a custom derivative rule",
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


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced `apply` with its sites and the plan to tap them."""

    jaxpr: jex_core.ClosedJaxpr
    sites: Sites
    plan: Plan
    num_branches: int


def parameter_paths(params: PyTree) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, in flattening order."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in leaves]


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
        The sites, and in `.uncovered` the reason for each selected parameter that has none. Printing
        the result gives the coverage table.

    Raises:
        ValueError: `apply` does not return one array, a parameter is not real floating point, a
            pattern matches no parameter, or the inputs' leading axes disagree.
    """
    return trace(apply, params, inputs, select).sites


def trace(apply, params, inputs, select=None) -> Program:
    """Trace `apply` abstractly and find its sites; see `find_sites`."""
    named = parameter_paths(params)
    selected = _selected([path for path, _ in named], select)
    _check_inputs(named, inputs)
    jaxpr, shape = jax.make_jaxpr(apply, return_shape=True)(params, inputs)
    if not isinstance(shape, jax.ShapeDtypeStruct):
        kind = jax.tree_util.tree_structure(shape)
        raise ValueError(
            f"apply must return one array (the model's outputs), but it returned {kind}; "
            "wrap it so that it returns the logits alone"
        )
    walker = _Walker()
    values = []
    for i, variable in enumerate(jaxpr.jaxpr.invars):
        if i < len(named) and named[i][0] in selected:
            origin = Provenance.of_leaf(named[i][0], variable.aval.shape)
            values.append(Value(("in", i), on_params=True, origin=origin))
        else:
            values.append(Value(("in", i), on_data=i >= len(named), on_params=i < len(named)))
    outs, plan = walker.walk(jaxpr.jaxpr, jaxpr.consts, values, Scope(), [True])
    for value in outs:
        walker.refuse(value.origin, "is returned by apply as it is")
    drafts = walker.resolve(selected)
    plan = plan.restricted({draft.tap for draft in drafts})
    sites = _named([draft.site for draft in drafts])
    uncovered = {path: walker.refused[path] for path in selected if path in walker.refused}
    return Program(jaxpr, Sites(sites, uncovered), plan, walker.num_branches)


def _selected(paths: list[str], select: str | Sequence[str] | None) -> list[str]:
    if select is None:
        return paths
    patterns = [select] if isinstance(select, str) else list(select)
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            known = ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
            raise ValueError(
                f"select: {pattern!r} matches no parameter; the parameters are: {known}"
            )
    return [path for path in paths if any(re.search(pattern, path) for pattern in patterns)]


def _check_inputs(named, inputs) -> None:
    for path, leaf in named:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            kind = "complex" if jnp.issubdtype(dtype, jnp.complexfloating) else "integer"
            raise ValueError(
                f"parameter {path!r} has {kind} dtype {dtype}; jedit edits real floating-point "
                "parameters: close over the others, or leave them out of params"
            )
    lengths = {
        jax.tree_util.keystr(p, simple=True, separator="/") or "inputs": jnp.shape(x)[0]
        for p, x in jax.tree_util.tree_flatten_with_path(inputs)[0]
        if jnp.ndim(x) > 0
    }
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the leading axes of the inputs disagree: {lengths}; every leaf leads with the examples"
        )


def _named(sites: list[Site]) -> tuple[Site, ...]:
    seen: dict[str, int] = {}
    out = []
    for site in sites:
        k = seen.get(site.path, 0)
        seen[site.path] = k + 1
        out.append(dataclasses.replace(site, name=site.path if k == 0 else f"{site.path}#{k}"))
    return tuple(out)


class _Walker:
    """Carries what a walk finds: site drafts, refusals, fresh numbers."""

    def __init__(self) -> None:
        self.drafts: list[Draft] = []
        self.refused: dict[str, str] = {}
        self.seen: set[str] = set()
        self.num_branches = 0
        self._records: dict[Any, int] = {}
        self._fresh = 0

    def fresh(self) -> tuple:
        self._fresh += 1
        return ("new", self._fresh)

    def record(self, number: Any) -> int:
        return self._records.setdefault(number, len(self._records))

    def refuse(self, origin: Provenance | None, reason: str, where: str = "") -> None:
        """Note why a parameter cannot be covered; the first reason stays."""
        if origin is not None:
            self.refused.setdefault(origin.path, reason + (f" ({where})" if where else ""))

    def resolve(self, selected: list[str]) -> list[Draft]:
        """Settle which biases belong to which weights, and drop what is not wholly covered."""
        users: dict[str, list[Draft]] = {}
        for draft in self.drafts:
            users.setdefault(draft.site.path, []).append(draft)

        def is_attached(bias: Draft) -> bool:
            host = bias.host
            if host is None or {host.site.path, bias.site.path} & set(self.refused):
                return False
            hosts = users[host.site.path]
            biases = users[bias.site.path]
            weights = {(h.site.weight, h.site.kind) for h in hosts}
            layouts = {b.bias_layout for b in biases}
            mine = [b.host for b in biases if b.host is not None]
            return (
                len(weights) == len(layouts) == 1
                and len(mine) == len(biases) == len(hosts)
                and {id(h) for h in mine} == {id(h) for h in hosts}
            )

        attached = [d for d in self.drafts if d.bias_layout is not None and is_attached(d)]
        for bias in attached:
            bias.host.site = bias.host.with_bias(bias)
        kept = [d for d in self.drafts if d not in attached and d.site.path not in self.refused]
        for path in selected:
            if path not in users and path not in self.refused:
                used = "only enters under stop_gradient" if path in self.seen else "is not used"
                self.refused[path] = f"{used} by apply"
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
                return Value(self.fresh(), constant=np.asarray(atom.val))
            return env.get(atom) or Value(self.fresh())  # what is dead is not followed

        for variable, value in zip(jaxpr.invars, invals, strict=True):
            env[variable] = value
        for variable, const in zip(jaxpr.constvars, consts, strict=True):
            small = np.asarray(const) if np.ndim(const) == 0 else None
            env[variable] = Value(self.fresh(), constant=small)
        plan = Plan()
        for i, eqn in enumerate(jaxpr.eqns):
            if not live[i]:
                continue
            values = [read(atom) for atom in eqn.invars]
            self.seen.update(v.origin.path for v in values if v.origin is not None)
            values = [  # an output seen by more than one equation is not simply "its bias added"
                dataclasses.replace(v, view=None)
                if v.view is not None and uses.get(atom, 0) != 1
                else v
                for v, atom in zip(values, eqn.invars, strict=True)
            ]
            outs = self._equation(i, eqn, values, scope, plan, uses)
            for variable, value in zip(eqn.outvars, outs, strict=True):
                env[variable] = value
        outs = [read(atom) for atom in jaxpr.outvars]
        outs = [
            dataclasses.replace(v, view=None) if v.view is not None and uses.get(a, 0) != 1 else v
            for v, a in zip(outs, jaxpr.outvars, strict=True)
        ]
        return outs, plan

    def _equation(self, i, eqn, values, scope, plan, uses) -> list[Value]:
        name = eqn.primitive.name
        if inner_jaxprs(eqn):
            scope = scope.called_from(eqn)
        live_out = [uses.get(v, 0) > 0 for v in eqn.outvars]
        if name in INLINED:
            jaxpr = inner_jaxprs(eqn)[0]
            outs, inner = self.walk(jaxpr.jaxpr, jaxpr.consts, values, scope, live_out)
            if inner:
                plan.inner[i] = (inner,)
            return outs
        if name == "scan":
            return self._scan(i, eqn, values, scope, plan, live_out)
        if name == "cond":
            return self._cond(i, eqn, values, scope, plan, live_out)
        where = source_line(eqn, scope.source)
        on_data = any(v.on_data for v in values)
        on_params = any(v.on_params for v in values)
        if name in NO_GRADIENT:
            return [Value(self.fresh(), on_data, on_params)]
        if name in IDENTITY:
            if len(values) == len(eqn.outvars):
                return list(values)
        folded = self._structure(eqn, values)
        if folded is not None:
            return [folded]
        found = recognize(eqn, values, scope)
        if isinstance(found, Draft):
            reads = found.reads
            if reads is not None:
                number = values[reads].number
                record = self.record((scope.key, number))
                found.site = dataclasses.replace(found.site, record=record)
            found.tap = len(self.drafts)
            self.drafts.append(found)
            plan.taps.setdefault(i, []).append(Tap(found.tap, found.site.record, reads))
            for k, value in enumerate(values):
                if k not in found.parameters and k != reads:
                    self.refuse(value.origin, f"enters `{name}`", where)
                if k == reads:
                    self.refuse(value.origin, "is used as an activation", where)
            out = Value(self.fresh(), on_data, True, view=found.view)
            return [out]
        if isinstance(found, Provenance):
            return [Value(self.fresh(), on_data, on_params, origin=found)]
        for value in values:
            reason = REASONS.get(name) or (found if isinstance(found, str) else f"enters `{name}`")
            self.refuse(value.origin, reason, where)
        constant = self._fold(eqn, values)
        return [Value(self.fresh(), on_data, on_params, constant=constant) for _ in eqn.outvars]

    def _structure(self, eqn, values) -> Value | None:
        """A relayout or a cast of one value: same number for equal inputs, origin and view kept."""
        name = eqn.primitive.name
        value, params = values[0] if values else None, eqn.params
        if value is None or len(eqn.outvars) != 1:
            return None
        shape = eqn.outvars[0].aval.shape
        origin = value.origin
        if name in CAST:
            if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
                return None
            arguments = (str(eqn.outvars[0].aval.dtype),)
            if not jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating):
                origin = None
            if eqn.outvars[0].aval.dtype == eqn.invars[0].aval.dtype and name == CAST[0]:
                return value
        elif name == "transpose":
            arguments = (tuple(params["permutation"]),)
            origin = origin and origin.transposed(arguments[0])
        elif name in ("reshape", "squeeze", "expand_dims"):
            if params.get("dimensions") is not None and name == "reshape":
                return None
            arguments = (shape,)
            origin = origin and origin.reshaped(shape)
        elif name == "broadcast_in_dim" and len(values) == 1:
            dims = tuple(int(d) for d in params["broadcast_dimensions"])
            arguments = (shape, dims)
            origin = origin and origin.broadcast(shape, dims)
        elif name == "slice":
            arguments = (params["start_indices"], params["limit_indices"], params["strides"])
            origin = origin and origin.sliced(*arguments)
        else:
            return None
        if value.origin is not None and origin is None:
            return None
        view = value.view and value.view.after(name, eqn)
        # a known scalar stays known when it is broadcast: all entries are equal
        constant = self._fold(eqn, values) if shape == () else value.constant
        return Value(
            (name, arguments, value.number), value.on_data, value.on_params, origin, constant, view
        )

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
            return np.asarray(eqn.primitive.bind(*(v.constant for v in values), **eqn.params))

    def _scan(self, i, eqn, values, scope, plan, live_out) -> list[Value]:
        body = eqn.params["jaxpr"]
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        on_data = any(v.on_data for v in values)
        on_params = any(v.on_params for v in values)
        inside = scope.scan(eqn.params["length"], self.fresh())
        carried_live = _carry_liveness(body.jaxpr, num_consts, num_carry, live_out)
        invals = []
        unchanged = [
            body.jaxpr.outvars[k] is body.jaxpr.invars[num_consts + k] for k in range(num_carry)
        ]
        for k, value in enumerate(values):
            origin, carry = value.origin, k - num_consts
            data, weights = value.on_data, value.on_params
            if 0 <= carry < num_carry and not unchanged[carry]:
                if carried_live[carry]:
                    self.refuse(origin, "is changed by a loop that carries it", scope.source)
                origin, data, weights = None, on_data, on_params
            elif carry >= num_carry and origin is not None:
                origin = origin.scanned(len(scope.lengths))
            number = (inside.key, value.number, "x" if carry >= num_carry else "c")
            invals.append(Value(number, data, weights, origin))
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
                self.refuse(out.origin, "is returned by a loop's body", scope.source)
            results.append(Value(self.fresh(), on_data, on_params))
        return results

    def _cond(self, i, eqn, values, scope, plan, live_out) -> list[Value]:
        on_data = any(v.on_data for v in values)
        on_params = any(v.on_params for v in values)
        self.refuse(values[0].origin, "decides a branch of `cond`", scope.source)
        plans = []
        for branch in eqn.params["branches"]:
            inside = scope.branched(self.fresh(), self.num_branches)
            self.num_branches += 1
            invals = [
                Value((inside.key, v.number), v.on_data, v.on_params, v.origin)
                for v in values[1:]
            ]
            outs, inner = self.walk(branch.jaxpr, branch.consts, invals, inside, live_out)
            inner.branch = inside.branch
            plans.append(inner)
            for out in outs:
                self.refuse(out.origin, "is returned by a branch of `cond`", scope.source)
        if any(plans):
            plan.inner[i] = tuple(plans)
        return [Value(self.fresh(), on_data, on_params) for _ in eqn.outvars]


def _carry_liveness(body, num_consts: int, num_carry: int, live_out: list[bool]) -> list[bool]:
    """Which carries matter: those used after the loop, or by what is used."""
    carried = list(live_out[:num_carry])
    while True:
        _, live_in = live_equations(body, [*carried, *live_out[num_carry:]])
        grown = [a or b for a, b in zip(carried, live_in[num_consts:][:num_carry], strict=True)]
        if grown == carried:
            return carried
        carried = grown
