"""Low-rank adapters (LoRA: Hu et al. 2022, arXiv:2106.09685) beside the matrices of any function.

    y = x W + scale · (x A) B        W (d_in, d_out) given, A (d_in, r) random, B (r, d_out) zero

The function is traced, and where a chosen parameter meets an activation in a product of matrices,
the second term is added: x A and (x A) B are products of their own, so capture finds A and B as
dense sites like any others. `scale` is the paper's α / r.

Which axes of a parameter are d_in is read from the product that it stands in, never from its shape;
A and B are matrices, of as many rows and columns as those axes multiply to.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jaxtyping import Array, Key, PyTree

from jedit.core.checks import COUNT, FINITE, check_numbers
from jedit.core.paths import matcher, parameter_paths
from jedit.core.precision import wide_dtype
from jedit.models.functional import Apply

CALLS = ("jit", "pjit", "closed_call", "core_call")
REMAT = ("remat", "remat2", "checkpoint")
# What changes how a parameter lies, and nothing else.
RELAYOUTS = ("transpose", "reshape", "squeeze", "convert_element_type", "copy", "copy_p")


class Adapted(NamedTuple):
    """A function with adapters.

    Attributes:
        apply: `(params, inputs) -> outputs`.
        params: {"base": the given ones, "lora": {... the path's names ...: {"a": A, "b": B}}}.
        merge: `params -> params` of the given function, the adapters added to the weights; sums
            in float32 or wider, weights in their own dtype.
    """

    apply: Apply
    params: dict[str, Any]
    merge: Callable[[PyTree], PyTree]


class _Mark(NamedTuple):
    """A value that is a parameter, relaid by these equations."""

    path: str
    equations: tuple[Any, ...]


class _Use(NamedTuple):
    """How a parameter stands in a product: its shape there, and the axes that are summed over."""

    relayouts: tuple[str, ...]
    shape: tuple[int, ...]
    summed: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.shape)) if i not in self.summed)

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.shape[i] for i in self.summed), tuple(self.shape[i] for i in self.kept)


class _Walk:
    """One evaluation: with adapters they are added, without them the uses are written down."""

    def __init__(self, adapters: dict[str, dict[str, Array]], scale: float):
        self.adapters = adapters
        self.scale = scale
        self.uses: dict[str, dict[_Use, _Mark]] = {}
        self.refused: dict[str, str] = {}

    def run(self, jaxpr: Any, consts: Any, inputs: Any, marks: Any) -> tuple[list, list]:
        """The outputs, and for each the parameter that it is."""
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
        marked = {v: m for v, m in zip(jaxpr.invars, marks, strict=True) if m is not None}

        def look(table: dict, atom: Any, literal: Callable[[Any], Any]) -> Any:
            return literal(atom) if isinstance(atom, jex_core.Literal) else table.get(atom)

        def nothing(atom: Any) -> None:
            del atom

        for equation in jaxpr.eqns:
            ins = [look(values, atom, lambda atom: atom.val) for atom in equation.invars]
            seen = [look(marked, atom, nothing) for atom in equation.invars]
            outs, out_marks = self.step(equation, ins, seen)
            values |= zip(equation.outvars, outs, strict=True)
            marked |= {v: m for v, m in zip(equation.outvars, out_marks, strict=True) if m}
        outs = [look(values, atom, lambda atom: atom.val) for atom in jaxpr.outvars]
        return outs, [look(marked, atom, nothing) for atom in jaxpr.outvars]

    def step(self, equation: Any, ins: list, marks: list) -> tuple[list, list]:
        name, nowhere = equation.primitive.name, [None] * len(equation.outvars)
        if not any(marks):
            return _bind(equation, ins), nowhere
        if name in CALLS or name in REMAT:
            inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            return self.enter(equation, inner, ins, marks)
        if name in RELAYOUTS and marks[0]:
            mark = _Mark(marks[0].path, (*marks[0].equations, equation))
            return _bind(equation, ins), [mark]
        outs = _bind(equation, ins)
        if name == "dot_general" and not all(marks):
            self.product(equation, ins, marks, outs)
        else:
            self.refused |= {mark.path: name for mark in marks if mark}
        return outs, nowhere

    def enter(self, equation: Any, inner: Any, ins: list, marks: list) -> tuple[list, list]:
        closed = isinstance(inner, jex_core.ClosedJaxpr)
        jaxpr, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
        if equation.primitive.name not in REMAT:
            return self.run(jaxpr, consts, ins, marks)
        out_marks: list = []

        def body(ins: list, adapters: dict) -> list:
            walk = _Walk(adapters, self.scale)
            walk.uses, walk.refused = self.uses, self.refused
            outs, found = walk.run(jaxpr, consts, ins, marks)
            out_marks[:] = found
            return outs

        options = {name: equation.params[name] for name in ("policy", "prevent_cse")}
        return jax.checkpoint(body, **options)(ins, self.adapters), out_marks

    def product(self, equation: Any, ins: list, marks: list, outs: list) -> None:
        side = 1 if marks[1] else 0
        mark, x = marks[side], ins[1 - side]
        summed, batch = equation.params["dimension_numbers"]
        if batch[side]:
            self.refused[mark.path] = "dot_general over a batch of matrices"
            return
        # In the order in which they lie in the parameter, whatever order the product names them in.
        pairs = sorted(zip(summed[side], summed[1 - side], strict=True))
        steps = tuple(f"{e.primitive.name} {sorted(e.params.items())}" for e in mark.equations)
        use = _Use(steps, tuple(ins[side].shape), tuple(i for i, _ in pairs))
        self.uses.setdefault(mark.path, {}).setdefault(use, mark)
        if mark.path not in self.adapters:
            return
        a, b = (self.adapters[mark.path][name].astype(x.dtype) for name in ("a", "b"))
        (d_in, d_out), precision = use.sizes, equation.params["precision"]
        a, b = a.reshape(*d_in, a.shape[1]), b.reshape(b.shape[0], *d_out)
        h = jax.lax.dot_general(
            x,
            a,
            ((tuple(i for _, i in pairs), tuple(range(len(d_in)))), ((), ())),
            precision=precision,
        )
        change = jax.lax.dot_general(h, b, (((h.ndim - 1,), (0,)), ((), ())), precision=precision)
        if side == 0:  # the parameter's axes lead
            change = jnp.moveaxis(change, range(h.ndim - 1), range(-(h.ndim - 1), 0))
        outs[0] = outs[0] + (change * jnp.asarray(self.scale, x.dtype)).astype(outs[0].dtype)


def with_lora(
    apply: Apply,
    params: PyTree,
    inputs: Any,
    *,
    rank: int,
    key: Key[Array, ""],
    select: str | None = None,
    scale: float = 1.0,
) -> Adapted:
    """Put adapters beside parameters; at first they change nothing, to the bit.

    To train, edit or measure the adapters alone, select them by their paths:
    `unlearn(..., trainable="^lora/")`, `kfac(..., select="^lora/")`, `find_sites(..., "^lora/")`.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`.
        params: its parameters.
        inputs: an example of what it takes, of which only shapes and dtypes matter.
        rank: r.
        key: for A, uniform between ±1/√d_in as in the authors' code.
        select: regular expression; a parameter of two axes or more is adapted if it is found in
            its path. None: all that stand in products alone; not a table that is looked up in,
            such as a tied embedding.
        scale: of the adapters' product, the paper's α / r.

    Returns:
        The adapted function, its parameters (adapters in the dtype of their weight), and what adds
        adapters to weights.

    Raises:
        ValueError: a rank below 1; nothing to adapt; a selected parameter that does anything but
            stand in products, or that two products read by different axes; two parameters of one
            path, or one whose path goes on where another's ends.
    """
    check_numbers(COUNT, rank=rank)
    check_numbers(FINITE, scale=scale)
    leaves = dict(parameter_paths(params))
    matrices = [path for path, leaf in leaves.items() if leaf.ndim > 1]
    names = list(filter(matcher("" if select is None else select, "select"), matrices))
    walk = _Walk({}, scale)
    jax.eval_shape(lambda p, x: _evaluate(walk, apply, p, x, names), params, inputs)
    uses = _checked(walk, names, select)
    if inside := [(p, q) for p in uses for q in uses if q.startswith(f"{p}/")]:
        raise ValueError(
            f"the adapters of {inside[0][1]!r} would stand inside those of {inside[0][0]!r}, a "
            "parameter itself; rename one of them"
        )
    lora: dict[str, Any] = {}
    for path, (use, _) in uses.items():
        d_in, d_out = (math.prod(sizes) for sizes in use.sizes)
        bound, dtype = 1 / math.sqrt(d_in), leaves[path].dtype
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(own_key, (d_in, rank), dtype, -bound, bound)
        node = lora
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node |= {"a": a, "b": jnp.zeros((rank, d_out), dtype)}

    def adapted(params: PyTree, inputs: Any) -> Any:
        adapters = {path: _at(params["lora"], path) for path in uses}
        return _evaluate(_Walk(adapters, scale), apply, params["base"], inputs, names)

    def merge(params: PyTree) -> PyTree:
        def merged(path: Any, leaf: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in uses:
                return leaf
            return _merged(leaf, _at(params["lora"], name), *uses[name], scale)

        return jax.tree_util.tree_map_with_path(merged, params["base"])

    return Adapted(adapted, {"base": params, "lora": lora}, merge)


def _evaluate(walk: _Walk, apply: Apply, params: PyTree, inputs: Any, names: list[str]) -> Any:
    closed, shape = jax.make_jaxpr(apply, return_shape=True)(params, inputs)
    marks: list = [
        _Mark(path, ()) if path in names else None for path, _ in parameter_paths(params)
    ]
    leaves = jax.tree.leaves((params, inputs))
    marks += [None] * (len(leaves) - len(marks))
    outs, found = walk.run(closed.jaxpr, closed.consts, leaves, marks)
    walk.refused |= {mark.path: "the outputs" for mark in found if mark}
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


def _at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def _checked(walk: _Walk, names: list[str], select: str | None) -> dict[str, tuple[_Use, _Mark]]:
    """The one use of each parameter.

    Raises:
        ValueError: as `with_lora`.
    """
    found = {}
    for path in names:
        uses = walk.uses.get(path, {})
        reason = f"it goes into {walk.refused[path]}" if path in walk.refused else None
        if reason is None and not uses:
            reason = "no product of matrices reads it"
        if reason is None and len(uses) > 1:
            reason = "two products read it by different axes"
        if reason is None:
            found[path] = next(iter(uses.items()))
        elif select is not None:
            raise ValueError(f"{path} cannot have an adapter: {reason}. Leave it out by `select`.")
    if not found:
        raise ValueError(f"select={select!r} leaves no parameter that can have an adapter.")
    return found


def _bind(equation: Any, ins: list) -> list:
    bound = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        outs = equation.primitive.bind(*ins, **bound)
    return list(outs) if equation.primitive.multiple_results else [outs]


def _merged(leaf: Array, adapter: Any, use: _Use, mark: _Mark, scale: float) -> Array:
    wide = wide_dtype(leaf.dtype)
    d_in, d_out = use.sizes
    change = adapter["a"].astype(wide) @ adapter["b"].astype(wide) * jnp.asarray(scale, wide)
    order = np.argsort((*use.summed, *use.kept)).tolist()
    change = change.reshape(*d_in, *d_out).transpose(order)

    def relay(x: Array) -> Array:
        for equation in mark.equations:
            if equation.primitive.name != "convert_element_type":
                (x,) = _bind(equation, [x])
        return x

    # A relayout moves numbers and no more: its transpose as a linear map is its inverse.
    (change,) = jax.linear_transpose(relay, jax.ShapeDtypeStruct(leaf.shape, wide))(change)
    return (leaf.astype(wide) + change).astype(leaf.dtype)
