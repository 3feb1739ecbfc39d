"""Softmaxes of scores in a traced program: put together value by value, wherever they are written.

A score is a product of two values that both depend on the inputs, changed entry by entry since. A
softmax of scores is confirmed as attention where it meets a third such value in a product.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex_core

from jedit.tracing import versions
from jedit.tracing.interpreter import Plan
from jedit.tracing.relations import ELEMENTWISE
from jedit.tracing.source import source_line
from jedit.tracing.versions import inner_jaxprs, scan_layout


@dataclasses.dataclass(frozen=True)
class _Sum:
    """The sum of an exponential's entries along axes; or its reciprocal, or its logarithm."""

    of: int
    axes: tuple[int, ...]
    form: str = "plain"


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a variable.

    Attributes:
        on_data: whether it depends on the inputs.
        is_score: whether it is a product of two such values, changed entry by entry since.
        exponential: number of the exponential of a score that it is, entry by entry.
        total: the sum of one that it is.
        weights: numbers of the softmaxes that it is made of.
    """

    on_data: bool = False
    is_score: bool = False
    exponential: int | None = None
    total: _Sum | None = None
    weights: frozenset[int] = frozenset()


@dataclasses.dataclass
class Candidate:
    """A softmax of scores, and where it stands."""

    plan: Plan
    equation: int
    keys: int
    rank: int
    shape: tuple[int, ...]
    dtype: str
    source: str


RELAYOUTS = frozenset(
    [
        "broadcast_in_dim",
        "concatenate",
        "copy",
        "expand_dims",
        "pad",
        "reshape",
        "rev",
        "slice",
        "split",
        "squeeze",
        "transpose",
        *versions.CAST,
        *versions.IDENTITY,
    ]
)
# What leaves an entry where it is: an exponential, or a sum, is still one after it.
_IN_PLACE = frozenset(["mul", "select_n", "stop_gradient", *versions.CAST, *versions.IDENTITY])
_OF_SUMS = frozenset(
    ["add", "broadcast_in_dim", "expand_dims", "max", "reshape", "select_n", "stop_gradient"]
    + [*versions.CAST, *versions.IDENTITY]
)
# What takes several values, and makes no product of theirs.
_MIXES_NO_PAIRS = frozenset(
    ["argsort", "conv_general_dilated", "dynamic_slice", "dynamic_update_slice", "gather"]
    + ["psum", "psum_invariant", "reduce", "reduce_window", "sort", "all_gather", "all_to_all"]
    + ["scatter", "scatter-add", "scatter_add", "scatter_max", "scatter_min", "scatter_mul"]
    + [*versions.RAGGED, "cumsum", "ppermute", "reduce_max", "reduce_sum", "top_k"]
)
LINEAR = "of scores and values without a softmax (linear attention)"
FLASH = "divides by the softmax's sum after the values (flash attention)"


class Search:
    """A walk over a program: candidates are softmaxes of scores, confirmed where values follow."""

    def __init__(self) -> None:
        self.candidates: list[Candidate] = []
        self.confirmed: set[int] = set()
        self.unseen: list[str] = []
        self._exponentials = 0
        self._branches = 0

    def walk(
        self, jaxpr, invals: list[Value], scans: tuple[int, ...], source: str
    ) -> tuple[list[Value], Plan]:
        """Follow values through one jaxpr, and return its outputs' values and the plan for it."""
        env: dict[Any, Value] = dict(zip(jaxpr.invars, invals, strict=True))
        plan = Plan()

        def read(atom) -> Value:
            known = None if isinstance(atom, jex_core.Literal) else env.get(atom)
            return Value() if known is None else known

        for i, eqn in enumerate(jaxpr.eqns):
            values = [read(atom) for atom in eqn.invars]
            if inner_jaxprs(eqn):
                outs = self._enter(i, eqn, values, scans, plan, source)
            else:
                outs = [self._equation(i, eqn, values, scans, plan, source)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars], plan

    def _enter(self, i, eqn, values, scans, plan, source) -> list[Value]:
        """Follow values into what an equation calls."""
        name, line = eqn.primitive.name, source_line(eqn, source)
        opaque = Value(on_data=any(v.on_data for v in values))
        if name in versions.INLINED:
            inside = inner_jaxprs(eqn)[0].jaxpr
            outs, inner = self.walk(inside, values, scans, line)
            plan.inner[i] = (inner,)
            return outs
        if name == "scan":
            body = eqn.params["jaxpr"].jaxpr
            num_consts, num_carry = scan_layout(eqn)
            # A carry may be of data from the second iteration on.
            into = [
                dataclasses.replace(v, on_data=opaque.on_data)
                if num_consts <= k < num_consts + num_carry
                else Value(v.on_data)
                for k, v in enumerate(values)
            ]
            lengths = (*scans, int(eqn.params["length"]))
            outs, inner = self.walk(body, into, lengths, line)
            plan.inner[i] = (inner,)
            return [Value(v.on_data) for v in outs]
        if name == "cond":
            walked = [
                self.walk(branch.jaxpr, values[1:], scans, line)
                for branch in eqn.params["branches"]
            ]
            for _, inner in walked:
                inner.branch = self._branches
                self._branches += 1
            plan.inner[i] = tuple(inner for _, inner in walked)
            return [opaque] * len(eqn.outvars)
        inside = inner_jaxprs(eqn)[0].jaxpr
        is_one_to_one = (len(inside.invars), len(inside.outvars)) == (
            len(eqn.invars),
            len(eqn.outvars),
        )
        if name in versions.CUSTOM_RULE and is_one_to_one:
            return self._whole(i, eqn, inside, values, scans, plan, line)
        if opaque.on_data and _attends(eqn, values, line):
            self.unseen.append(f"what is inside `{name}` ({line})")
        return [opaque] * len(eqn.outvars)

    def _whole(self, i, eqn, inside, values, scans, plan, line) -> list[Value]:
        """Follow values through a call that must stay whole: it may be a softmax itself."""
        within, base = Search(), len(self.candidates)
        within.candidates, within._exponentials = list(self.candidates), self._exponentials
        outs, _ = within.walk(inside, values, scans, line)
        self._exponentials = within._exponentials
        self.confirmed |= {n for n in within.confirmed if n < base}
        if within.unseen or any(n >= base for n in within.confirmed):
            self.unseen.append(
                f"attention inside a function with a custom derivative rule ({line})"
            )
        mine = [n for n in range(base, len(within.candidates)) if n not in within.confirmed]
        found = [
            dataclasses.replace(v, weights=frozenset(n for n in v.weights if n < base))
            for v in outs
        ]
        if len(outs) == 1 and any(n in outs[0].weights for n in mine):
            found = [self._candidate(i, eqn, within.candidates[mine[-1]].keys, scans, plan, line)]
        return found

    def _candidate(self, i, eqn, keys: int, scans, plan: Plan, source: str) -> Value:
        out = eqn.outvars[0].aval
        self.candidates.append(
            Candidate(
                plan,
                i,
                keys,
                out.ndim,
                (*scans, *out.shape),
                str(out.dtype),
                source_line(eqn, source),
            )
        )
        return Value(True, weights=frozenset([len(self.candidates) - 1]))

    def _equation(self, i, eqn, values, scans, plan, source) -> Value:
        name = eqn.primitive.name
        on_data = any(v.on_data for v in values)
        if name == "dot_general":
            return self._product(eqn, values, source)
        if name in ("exp", "exp2") and values[0].is_score:
            total = values[0].total
            is_logged = total is not None and (name, total.form) == ("exp", "log")
            if total is not None and is_logged and len(total.axes) == 1:
                return self._candidate(i, eqn, total.axes[0], scans, plan, source)
            self._exponentials += 1
            return Value(True, exponential=self._exponentials)
        if name == "reduce_sum" and values[0].exponential is not None:
            axes = tuple(int(axis) for axis in eqn.params["axes"])
            return Value(on_data, total=_Sum(values[0].exponential, axes))
        quotient = self._quotient(i, eqn, values, scans, plan, source)
        if quotient is not None:
            return quotient
        is_entrywise = name in ELEMENTWISE or name in RELAYOUTS
        if not is_entrywise:
            floats = sum(
                v.on_data and jnp.issubdtype(atom.aval.dtype, jnp.floating)
                for v, atom in zip(values, eqn.invars, strict=True)
            )
            if floats > 1 and name not in _MIXES_NO_PAIRS:
                where = source_line(eqn, source)
                self.unseen.append(f"what `{name}` makes of several values ({where})")
            return Value(on_data)
        exponentials = {v.exponential for v in values if v.exponential is not None}
        keeps = len(exponentials) == 1 and name in _IN_PLACE
        return Value(
            on_data,
            is_score=any(v.is_score for v in values),
            exponential=exponentials.pop() if keeps else None,
            total=_total(eqn, values),
            weights=frozenset().union(*(v.weights for v in values)),
        )

    def _quotient(self, i, eqn, values, scans, plan, source) -> Value | None:
        """Return the softmax that an equation completes, if it does."""
        name = eqn.primitive.name
        if name not in ("div", "mul") or len(values) != 2:
            return None
        form = "plain" if name == "div" else "reciprocal"
        pairs = [values] if name == "div" else [values, values[::-1]]
        for top, bottom in pairs:
            total = bottom.total
            if total is None or top.exponential is None or len(total.axes) != 1:
                continue
            if (total.of, total.form) == (top.exponential, form):
                return self._candidate(i, eqn, total.axes[0], scans, plan, source)
        return None

    def _product(self, eqn, values, source) -> Value:
        a, b = values
        for one, other in ((a, b), (b, a)):
            if other.on_data:
                self.confirmed |= one.weights
                if one.exponential is not None:
                    self.unseen.append(f"a product that {FLASH} ({source_line(eqn, source)})")
                elif one.is_score and not one.weights:
                    self.unseen.append(f"a product {LINEAR} ({source_line(eqn, source)})")
        is_both, weights = a.on_data and b.on_data, a.weights | b.weights
        # Heads that are mixed by a parameter are still weights; values summed by them are not.
        return Value(
            a.on_data or b.on_data,
            is_score=is_both and not weights,
            weights=frozenset() if is_both else weights,
        )


def _attends(eqn, values: list[Value], line: str) -> bool:
    """Return whether what an equation calls, and cannot be taken apart, may be attention."""
    name = eqn.primitive.name
    if name == "pallas_call":
        # What a kernel does with its operands' references is not followed.
        names = _names_in([x.jaxpr for x in inner_jaxprs(eqn)])
        is_softmax = "dot_general" in names and bool(names & {"exp", "exp2"})
        return is_softmax or sum(v.on_data for v in values) > 1
    on_data = [v.on_data for v in values]
    for closed in inner_jaxprs(eqn):
        number = len(closed.jaxpr.invars)
        into = on_data if number == len(values) else [True] * number
        if name == "while":
            cond, body = (eqn.params[f"{part}_nconsts"] for part in ("cond", "body"))
            carry = [any(on_data)] * (len(values) - cond - body)
            is_body = closed is eqn.params["body_jaxpr"]
            into = (on_data[cond : cond + body] if is_body else on_data[:cond]) + carry
        hidden = Search()
        hidden.walk(closed.jaxpr, [Value(x) for x in into], (), line)
        if hidden.confirmed or hidden.unseen:
            return True
    return False


def _names_in(jaxprs: list) -> set[str]:
    """Return the names of all primitives, inner ones too."""
    equations = [eqn for jaxpr in jaxprs for eqn in jaxpr.eqns]
    inner = [closed.jaxpr for eqn in equations for closed in inner_jaxprs(eqn)]
    return {eqn.primitive.name for eqn in equations} | (_names_in(inner) if inner else set())


def _total(eqn, values: list[Value]) -> _Sum | None:
    """Return the sum that is still known after an equation, if there is one."""
    name = eqn.primitive.name
    sums = [v.total for v in values if v.total is not None]
    if len(sums) != 1:
        return None
    (total,) = sums
    if name == "log" and total.form == "plain":
        return dataclasses.replace(total, form="log")
    if name == "sub" and total.form == "log" and values[1].total is total:
        return total
    if name == "div" and total.form == "plain" and values[1].total is total:
        return None if values[0].on_data else dataclasses.replace(total, form="reciprocal")
    if name == "integer_pow":
        is_reciprocal = (eqn.params["y"], total.form) == (-1, "plain")
        return dataclasses.replace(total, form="reciprocal") if is_reciprocal else None
    return total if name in _OF_SUMS else None
