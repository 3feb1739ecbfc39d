"""Attention weights of any traced model: found by the program's structure, read, and replaced.

A model's attention is, whatever library wrote it,

    s = q · k           a `dot_general` of two values that both depend on the inputs
    p = softmax(s)      after scaling, masks, caps, biases; along the keys
    o = p · v           a `dot_general` of p with a third such value

and its weights are p, as they leave the softmax: before a dropout or a cast.  A softmax is
recognised by what it computes (`exp`, its sum, their quotient, or `exp` of logits less the log of
that sum), as a function of its own or written out, under jit, remat and scan.

What forms no weights is not found, and said: flash attention, which divides by the sum after the
values; scores that meet values without a softmax; kernels, and any primitive not known here that
takes several values of the data; and attention inside a function with a custom derivative rule,
which must stay whole, or in a `while` loop. Not told is linear attention as a recurrence, whose
state is carried from position to position: it is no sum over scores.
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
from jedit.tracing.dependence import at_probes
from jedit.tracing.interpreter import Plan, Records, Rewrite, Tap, evaluate
from jedit.tracing.pullback import argument_leaves
from jedit.tracing.softmax import Candidate, Search, Value


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
    search = Search()
    values = [Value(on_data=i >= num_params) for i in range(len(jaxpr.jaxpr.invars))]
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
    if any(one.examples is None for one in found) and _leads(inputs) == {1}:
        # An axis of length one is nobody's: with two examples the axes can be told apart.
        two = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), inputs)
        axes = _trace(apply, params, two).found.values()
        if len(axes) == len(found):
            found = tuple(
                dataclasses.replace(one, examples=other.examples, queries=other.queries)
                for one, other in zip(found, axes, strict=True)
            )
    return _Traced(jaxpr, plan, Attentions(found, tuple(dict.fromkeys(search.unseen))))


def _leads(inputs: PyTree) -> set[int]:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs)]
    return {shape[0] if shape else 0 for shape in shapes}


def _described(number: int, candidate: Candidate, labels, lead: tuple[int, ...]) -> Attention:
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
