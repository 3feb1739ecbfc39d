"""Attention weights of any traced model: found by the program's structure, read, and replaced.

A model's attention is, whatever library wrote it,

    s = q · k           a `dot_general` of two values that both depend on the inputs
    p = softmax(s)      after scaling, masks, caps, biases; along the keys
    o = p · v           a `dot_general` of p with a third such value

and its weights are p, as they leave the softmax: before a dropout or a cast.  A softmax is
recognised by what it computes (`exp`, its sum, their quotient, or `exp` of logits less the log of
that sum), as a function of its own or written out, under jit, remat and scan.

What forms no weights is not found, and said: flash attention, which divides by the sum after the
values, kernels of any kind, and attention inside a function with a custom derivative rule, which
must stay whole, or in a `while` loop.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_function, check_inputs, check_params
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.tracing import versions
from jedit.tracing.dependence import at_probes
from jedit.tracing.interpreter import Plan, Records, Rewrite, Tap, evaluate
from jedit.tracing.pullback import argument_leaves
from jedit.tracing.relations import ELEMENTWISE
from jedit.tracing.source import source_line
from jedit.tracing.versions import inner_jaxprs, scan_layout


@dataclasses.dataclass(frozen=True)
class Attention:
    """One place where a program attends.

    Attributes:
        name: "attention/0", "attention/1", ..., in the program's order.
        shape: shape of the weights; axes of scans, such as a stack of layers, in front.
        dtype: their dtype.
        keys: the axis along which they sum to one.
        queries: the axis of the queries, where they are positions of the outputs, else None.
        examples: the axis of the examples, where the program tells which it is, else None.
        num_scans: how many axes in front belong to scans.
        source: line of the user's program.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    keys: int
    queries: int | None
    examples: int | None
    num_scans: int
    source: str


class Attentions(Mapping[str, Attention]):
    """A program's attention by name, and in `.unseen` what looks like some and forms no weights."""

    def __init__(self, found: tuple[Attention, ...], unseen: tuple[str, ...]):
        self._found = {one.name: one for one in found}
        self.unseen = unseen

    def __getitem__(self, name: str) -> Attention:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        lines = [
            f"{x.name}  {x.dtype}{list(x.shape)}  keys: axis {x.keys}  {x.source}"
            for x in self._found.values()
        ]
        return "\n".join([*lines, *(f"unseen: {reason}" for reason in self.unseen)])


class Attended(NamedTuple):
    """The results of a forward pass whose attention was read, or changed.

    Attributes:
        outputs: what `apply` returned.
        weights: by name the weights that the values were summed with, after the change.
    """

    outputs: Array
    weights: dict[str, Array]

    __repr__ = short_repr


@on_auto_axes
def find_attention(apply: Callable, params: PyTree, inputs: PyTree) -> Attentions:
    """Find where `apply(params, inputs)` attends, without computing anything.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
        inputs: pytree of arrays that lead with the examples.

    Returns:
        What was found by name, in the program's order; it may be empty.

    Raises:
        TypeError: an argument is something else.
        ValueError: `apply` does not return one array.
    """
    return _trace(apply, params, inputs).found


@on_auto_axes
def attention_weights(
    apply: Callable,
    params: PyTree,
    inputs: PyTree,
    *,
    replace: Mapping[str, Callable[[Array], Array] | Array] | None = None,
) -> Attended:
    """Run `apply` once, and return the attention weights beside its outputs; or change them.

        found = attention_weights(apply, params, tokens)
        off = lambda p: p.at[..., 3].set(0)
        changed = attention_weights(apply, params, tokens, replace={"attention/0": off})

    Differentiable, also in what is put in place. Costs one forward pass, and the memory of what is
    returned.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of arrays.
        inputs: pytree of arrays that lead with the examples.
        replace: by name, a function of the weights that returns others of their shape (in a scan it
            is called for one iteration, without the scan's axis), or an array that takes their
            place (of the full shape, scans in front; or one that broadcasts to it).

    Returns:
        The outputs and the weights.

    Raises:
        TypeError: an argument is something else.
        ValueError: a name is none of this program's attention, of which it says what there is; or a
            replacement has another shape.
    """
    traced, replace = _trace(apply, params, inputs), dict(replace or {})
    if unknown := [name for name in replace if name not in traced.found]:
        there = ", ".join(traced.found) or "none"
        unseen = f"; unseen: {'; '.join(traced.found.unseen)}" if traced.found.unseen else ""
        raise ValueError(f"{unknown} are no attention of this function; it has {there}{unseen}")
    probes: dict[int, Any] = {}
    for number, one in enumerate(traced.found.values()):
        probes[number] = _rewrite(one, replace.get(one.name))
    records, jaxpr = Records(is_watching=True), traced.jaxpr
    leaves = argument_leaves(params, inputs)
    outs = evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, traced.plan, probes, records)
    weights = {one.name: records.outputs[i] for i, one in enumerate(traced.found.values())}
    return Attended(outs[0], weights)


def _rewrite(one: Attention, by: Callable[[Array], Array] | Array | None) -> Rewrite:
    if by is None:
        return Rewrite()
    if not callable(by):
        return Rewrite(lambda _, given: given, jnp.broadcast_to(by, one.shape).astype(one.dtype))

    def change(weights: Array, _: None) -> Array:
        changed = jnp.asarray(by(weights))
        if changed.shape != weights.shape:
            raise ValueError(
                f"the replacement of {one.name} returned {changed.shape}, expected the weights' "
                f"shape {weights.shape}"
            )
        return changed.astype(weights.dtype)

    return Rewrite(change)


class _Traced(NamedTuple):
    jaxpr: jex_core.ClosedJaxpr
    plan: Plan
    found: Attentions


def _trace(apply: Callable, params: PyTree, inputs: PyTree) -> _Traced:
    check_function(apply)
    check_params(params)
    check_inputs(inputs)
    jaxpr, shape = jax.make_jaxpr(apply, return_shape=True)(params, inputs)
    if not isinstance(shape, jax.ShapeDtypeStruct):
        raise ValueError(
            "apply must return one array (the model's outputs), but it returned "
            f"{jax.tree_util.tree_structure(shape)}; wrap it so that it returns the logits alone"
        )
    num_params = len(jax.tree.leaves(params))
    search = _Search()
    values = [_Value(on_data=i >= num_params) for i in range(len(jaxpr.jaxpr.invars))]
    _, plan = search.walk(jaxpr.jaxpr, values, (), "")
    chosen = [search.candidates[i] for i in sorted(search.confirmed)]
    # Numbered anew, in the program's order; what met no values is an ordinary softmax.
    for number, candidate in enumerate(chosen):
        tap = Tap(number, (), candidate.shape, candidate.dtype)
        candidate.plan.taps.setdefault(candidate.equation, []).append(tap)
    plan = plan.restricted(set(range(len(chosen))))
    lead = shape.shape[:-1]
    labels = at_probes(jaxpr, plan, num_params, lead)[1] if chosen and lead else {}
    found = tuple(_described(i, c, labels.get(i, ()), lead) for i, c in enumerate(chosen))
    return _Traced(jaxpr, plan, Attentions(found, tuple(dict.fromkeys(search.unseen))))


def _described(number: int, candidate: "_Candidate", labels, lead: tuple[int, ...]) -> Attention:
    num_scans = len(candidate.shape) - candidate.rank
    keys = num_scans + candidate.keys

    def axis_of(which: int, but: tuple[int | None, ...]) -> int | None:
        """Return the one whole axis that counts as the outputs' does, if there is one."""
        axes = {
            place.axis
            for k, place in labels
            if k == which
            and (place.inner, place.size) == (1, candidate.shape[place.axis])
            and place.axis >= num_scans
        } - set(but)
        return axes.pop() if len(axes) == 1 else None

    examples = axis_of(0, (keys,))
    queries = axis_of(1, (keys, examples)) if len(lead) > 1 else None
    return Attention(
        f"attention/{number}",
        candidate.shape,
        candidate.dtype,
        keys,
        queries,
        examples,
        num_scans,
        candidate.source,
    )


# How a softmax is put together, followed value by value.


@dataclasses.dataclass(frozen=True)
class _Sum:
    """The sum of an exponential's entries along axes; or its reciprocal, or its logarithm."""

    of: int
    axes: tuple[int, ...]
    form: str = "plain"


@dataclasses.dataclass(frozen=True)
class _Value:
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
class _Candidate:
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
FLASH = "divides by the softmax's sum after the values (flash attention)"


class _Search:
    """A walk over a program: candidates are softmaxes of scores, confirmed where values follow."""

    def __init__(self) -> None:
        self.candidates: list[_Candidate] = []
        self.confirmed: set[int] = set()
        self.unseen: list[str] = []
        self._exponentials = 0
        self._branches = 0

    def walk(
        self, jaxpr, invals: list[_Value], scans: tuple[int, ...], source: str
    ) -> tuple[list[_Value], Plan]:
        """Follow values through one jaxpr, and return its outputs' values and the plan for it."""
        env: dict[Any, _Value] = dict(zip(jaxpr.invars, invals, strict=True))
        plan = Plan()

        def read(atom) -> _Value:
            known = None if isinstance(atom, jex_core.Literal) else env.get(atom)
            return _Value() if known is None else known

        for i, eqn in enumerate(jaxpr.eqns):
            values = [read(atom) for atom in eqn.invars]
            if inner_jaxprs(eqn):
                outs = self._enter(i, eqn, values, scans, plan, source)
            else:
                outs = [self._equation(i, eqn, values, scans, plan, source)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars], plan

    def _enter(self, i, eqn, values, scans, plan, source) -> list[_Value]:
        """Follow values into what an equation calls."""
        name, line = eqn.primitive.name, source_line(eqn, source)
        opaque = _Value(on_data=any(v.on_data for v in values))
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
                else _Value(v.on_data)
                for k, v in enumerate(values)
            ]
            lengths = (*scans, int(eqn.params["length"]))
            outs, inner = self.walk(body, into, lengths, line)
            plan.inner[i] = (inner,)
            return [_Value(v.on_data) for v in outs]
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
        if name not in versions.CUSTOM_RULE and sum(v.on_data for v in values) > 1:
            hidden = _Search()
            hidden.walk(inside, [_Value(True)] * len(inside.invars), scans, line)
            if name == "pallas_call" or hidden.confirmed or hidden.unseen:
                self.unseen.append(f"what is inside `{name}` ({line})")
        return [opaque] * len(eqn.outvars)

    def _whole(self, i, eqn, inside, values, scans, plan, line) -> list[_Value]:
        """Follow values through a call that must stay whole: it may be a softmax itself."""
        within, base = _Search(), len(self.candidates)
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

    def _candidate(self, i, eqn, keys: int, scans, plan: Plan, source: str) -> _Value:
        out = eqn.outvars[0].aval
        self.candidates.append(
            _Candidate(
                plan,
                i,
                keys,
                out.ndim,
                (*scans, *out.shape),
                str(out.dtype),
                source_line(eqn, source),
            )
        )
        return _Value(True, weights=frozenset([len(self.candidates) - 1]))

    def _equation(self, i, eqn, values, scans, plan, source) -> _Value:
        name = eqn.primitive.name
        on_data = any(v.on_data for v in values)
        if name == "dot_general":
            return self._product(eqn, values, source)
        if name == "exp" and values[0].is_score:
            total = values[0].total
            if total is not None and total.form == "log" and len(total.axes) == 1:
                return self._candidate(i, eqn, total.axes[0], scans, plan, source)
            self._exponentials += 1
            return _Value(True, exponential=self._exponentials)
        if name == "reduce_sum" and values[0].exponential is not None:
            axes = tuple(int(axis) for axis in eqn.params["axes"])
            return _Value(on_data, total=_Sum(values[0].exponential, axes))
        quotient = self._quotient(i, eqn, values, scans, plan, source)
        if quotient is not None:
            return quotient
        is_entrywise = name in ELEMENTWISE or name in RELAYOUTS
        if not is_entrywise:
            return _Value(on_data)
        exponentials = {v.exponential for v in values if v.exponential is not None}
        keeps = len(exponentials) == 1 and name in _IN_PLACE
        return _Value(
            on_data,
            is_score=any(v.is_score for v in values),
            exponential=exponentials.pop() if keeps else None,
            total=_total(name, values),
            weights=frozenset().union(*(v.weights for v in values)),
        )

    def _quotient(self, i, eqn, values, scans, plan, source) -> _Value | None:
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

    def _product(self, eqn, values, source) -> _Value:
        a, b = values
        for one, other in ((a, b), (b, a)):
            if other.on_data:
                self.confirmed |= one.weights
                if one.exponential is not None:
                    self.unseen.append(f"a product that {FLASH} ({source_line(eqn, source)})")
        return _Value(a.on_data or b.on_data, is_score=a.on_data and b.on_data)


def _total(name: str, values: list[_Value]) -> _Sum | None:
    """Return the sum that is still known after an equation, if there is one."""
    sums = [v.total for v in values if v.total is not None]
    if len(sums) != 1:
        return None
    (total,) = sums
    if name == "log" and total.form == "plain":
        return dataclasses.replace(total, form="log")
    if name == "sub" and total.form == "log" and values[1].total is total:
        return total
    if name == "div" and total.form == "plain" and values[1].total is total:
        return dataclasses.replace(total, form="reciprocal")
    if name == "integer_pow":
        return dataclasses.replace(total, form="reciprocal")
    return total if name in _OF_SUMS else None
