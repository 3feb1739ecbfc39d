"""Low-rank adapters (LoRA: Hu et al. 2022, arXiv:2106.09685) beside the matrices of any function.

    y = x W + scale · (x A) B        W (d_in, d_out) given, A (d_in, r) random, B (r, d_out) zero

The function is traced, and at the dense sites of a chosen parameter the second term is added: x A
and (x A) B are products of their own, so capture finds A and B as dense sites like any others.
`scale` is the paper's α / r.

Which axes of a parameter are d_in is read from the product that it stands in, never from its shape;
A and B are matrices, of as many rows and columns as those axes multiply to.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Key, PyTree

from jedit.core.batch import Apply
from jedit.core.checks import COUNT, FINITE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.paths import exactly, matcher, parameter_paths
from jedit.core.precision import wide_dtype
from jedit.tracing.discover import Program, trace_program
from jedit.tracing.interpreter import Plan, Records, evaluate
from jedit.tracing.pullback import argument_leaves
from jedit.tracing.sites import Axes, Site, Weight
from jedit.tracing.versions import inner_jaxprs


class Adapted(NamedTuple):
    """A function with low-rank adapters, its parameters, and the way to merge them.

    Attributes:
        apply: `(params, inputs) -> outputs` of the adapted function.
        params: {"base": the given ones, "lora": {... the path's names ...: {"a": A, "b": B}}}.
        merge: `params -> params` of the given function, the adapters added to the weights; sums
            in float32 or wider, weights in their own dtype.
        start: `{path: (A, B)} -> params` that begin there: what scale · A B adds is taken off the
            weights, so that the function is kept to rounding; other adapters stay as they are.
    """

    apply: Apply
    params: dict[str, Any]
    merge: Callable[[PyTree], PyTree]
    start: Callable[[Mapping[str, tuple[Array, Array]]], dict[str, Any]]


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
    `TrainingMethod(..., trainable="^lora/")`, `kfac(..., select="^lora/")`,
    `find_sites(..., "^lora/")`.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: the function's parameters.
        inputs: an example of what it takes, of which only shapes and dtypes matter.
        rank: rank r of the adapters.
        key: for A, uniform between ±1/√d_in as in the authors' code.
        select: regular expression; a parameter of two axes or more is adapted if it is found in
            its path. None: all that stand in products alone; not a table that is looked up in,
            such as a tied embedding, nor layers that a loop takes out of one array.
        scale: factor of the adapters' product, the paper's α / r.

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
    weights = adapter_weights(apply, params, inputs, select)
    if inside := [(p, q) for p in weights for q in weights if q.startswith(f"{p}/")]:
        raise ValueError(
            f"the adapters of {inside[0][1]!r} would stand inside those of {inside[0][0]!r}, a "
            "parameter itself; rename one of them"
        )
    lora: dict[str, Any] = {}
    for path, weight in weights.items():
        bound, dtype = 1 / math.sqrt(weight.d_in), leaves[path].dtype
        # By path: selecting more parameters leaves the others' adapters as they were.
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(own_key, (weight.d_in, rank), dtype, -bound, bound)
        node = lora
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node |= {"a": a, "b": jnp.zeros((rank, weight.d_out), dtype)}
    chosen = exactly(weights)

    @on_auto_axes
    def adapted(params: PyTree, inputs: Any) -> Any:
        program = trace_program(apply, params["base"], inputs, chosen)
        probes = {}
        for site in program.sites.values():
            adapter = _at(params["lora"], site.path)
            change = functools.partial(_change, site, scale)
            # A pytree, because it goes into the jaxprs that are inside.
            probes[site.probe] = Partial(change, adapter["a"], adapter["b"])
        jaxpr, given = program.jaxpr, argument_leaves(params["base"], inputs)
        return evaluate(jaxpr.jaxpr, jaxpr.consts, given, program.plan, probes, Records())[0]

    def added(base: PyTree, pairs: Mapping[str, tuple[Array, Array]], factor: float) -> PyTree:
        leaves = dict(parameter_paths(base))
        for path, pair in pairs.items():
            leaf, wide = leaves[path], wide_dtype(leaves[path].dtype)
            a, b = (x.astype(wide) for x in pair)
            # `scatter` undoes whatever axes the products read the weight by; B = 0 makes it exactly
            # zero.
            change = weights[path].scatter((a @ b * jnp.asarray(factor, wide))[None])[path]
            leaves[path] = (leaf.astype(wide) + change).astype(leaf.dtype)
        return jax.tree.unflatten(jax.tree.structure(base), leaves.values())

    def merge(params: PyTree) -> PyTree:
        adapters = ((path, _at(params["lora"], path)) for path in weights)
        return added(params["base"], {path: (x["a"], x["b"]) for path, x in adapters}, scale)

    def start(pairs: Mapping[str, tuple[Array, Array]]) -> dict[str, Any]:
        if unknown := [path for path in pairs if path not in weights]:
            raise ValueError(f"{unknown} have no adapters; those that have are {list(weights)}")
        begun = jax.tree.map(lambda x: x, lora)
        kept = {}
        for path, (a, b) in pairs.items():
            weight = weights[path]
            if a.ndim != 2 or (len(a), *b.shape) != (weight.d_in, a.shape[1], weight.d_out):
                raise ValueError(
                    f"the adapter of {path!r} has shapes {a.shape} and {b.shape}, expected "
                    f"({weight.d_in}, rank) and (rank, {weight.d_out})"
                )
            dtype = leaves[path].dtype
            # What is taken off the weights is what is kept, after its rounding.
            kept[path] = a.astype(dtype), b.astype(dtype)
            _at(begun, path).update(a=kept[path][0], b=kept[path][1])
        return {"base": added(params, kept, -scale), "lora": begun}

    return Adapted(adapted, {"base": params, "lora": lora}, merge, start)


def adapter_weights(
    apply: Apply, params: PyTree, inputs: Any, select: str | None
) -> dict[str, Weight]:
    """Return the matrices that `with_lora` puts adapters beside, by their parameters' paths.

    Raises:
        ValueError: as `with_lora`.
    """
    matrices = [path for path, leaf in parameter_paths(params) if leaf.ndim > 1]
    names = list(filter(matcher("" if select is None else select, "select"), matrices))
    return _weights(trace_program(apply, params, inputs), names, select)


def _change(site: Site, scale: float, a: Array, b: Array, x: Array) -> Array:
    """Return what a site's adapter adds to its output."""
    assert isinstance(site.axes_in, Axes)
    assert isinstance(site.axes_out, Axes)
    inputs = site.axes_in.canonical(x)
    change = inputs @ a.astype(x.dtype) @ b.astype(x.dtype)
    change = change * jnp.asarray(scale * site.scale, x.dtype)
    order = site.axes_out.permutation
    change = change.reshape([site.output_shape[i] for i in order])
    return change.transpose(np.argsort(order).tolist()).astype(site.output_dtype)


def _at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def _weights(program: Program, names: list[str], select: str | None) -> dict[str, Weight]:
    """Return the matrix that each parameter is in all its products.

    Raises:
        ValueError: a parameter that `with_lora` refuses.
    """
    looped = _probes_in_loops(program.jaxpr.jaxpr, program.plan)
    sites: dict[str, list[Site]] = {}
    for site in program.sites.values():
        for path in site.weight.paths:
            sites.setdefault(path, []).append(site)
    found = {}
    for path in names:
        reason = program.sites.uncovered.get(path) or _reason(path, sites[path], looped)
        if reason is None and path in program.sites.stopped:
            reason = "enters where no gradient flows, too"
        if reason is None:
            found[path] = sites[path][0].weight.kernel
        elif select is not None:
            raise ValueError(
                f"{path} cannot have an adapter: it {reason}. Leave it out by `select`."
            )
    if not found:
        raise ValueError(f"select={select!r} leaves no parameter that can have an adapter.")
    return found


def _reason(path: str, sites: list[Site], looped: set[int]) -> str | None:
    """Say why sites of one parameter cannot have an adapter, if so."""
    for site in sites:
        if site.kind != "dense" or site.path != path:
            return f"stands in no product of matrices at {site.source}"
        if site.probe in looped:
            return f"stands in a loop at {site.source}"
        if site.weight.layers > 1 or site.weight.is_stacked:
            return f"stands in a product over a batch of matrices at {site.source}"
        if site.window_in is not None or site.window_out is not None:
            return f"is joined to others at {site.source}"
    # One A B cannot be the change of a matrix and of its transpose read by other axes.
    if len({site.weight.kernel for site in sites}) > 1:
        return "is read by different axes in two products"
    return None


def _probes_in_loops(jaxpr: Any, plan: Plan) -> set[int]:
    """Return the probes of which a scan takes one slice in each step."""
    found: set[int] = set()
    for i, plans in plan.inner.items():
        equation = jaxpr.eqns[i]
        for inner, mine in zip(inner_jaxprs(equation), plans, strict=True):
            if equation.primitive.name == "scan":
                found |= {tap.probe for tap in mine.all_taps()}
            else:
                found |= _probes_in_loops(inner.jaxpr, mine)
    return found
