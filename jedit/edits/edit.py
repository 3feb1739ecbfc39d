"""An edit is a value: what to add to which parameters, and nothing about the model.

    p <- p + scale · Δ_p      for every path p of the edit

It is applied only by `apply_edit`, which returns new params; it can be reverted, scaled, added to
others, and applied again to a model that was trained further. Paths are those of
`jedit.core.paths.parameter_paths`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind, check_params, nearest
from jedit.core.checks import FINITE, check_finite, check_numbers
from jedit.core.devices import on_auto_axes, sharding_of
from jedit.core.display import (
    MAX_ROWS,
    html_table,
    is_concrete,
    num_megabytes,
    short,
    short_repr,
    text_table,
)
from jedit.core.paths import matcher, parameter_paths
from jedit.core.precision import HIGHEST
from jedit.edits.low_rank import Delta, LowRank, added, dense, scaled

Scalar = float | int | Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edit:
    """Changes of some parameters; a pytree, so it jits, vmaps, shards and saves.

    Adding edits takes the union of their paths; multiplying by a number scales every block.

    Attributes:
        blocks: parameter path to the change of that parameter: an array of its shape, or `LowRank`.
    """

    blocks: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"{self._heading()}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), [self._heading()])

    def _heading(self) -> str:
        number = len(self.blocks)
        plural = "" if number == 1 else "s"
        return f"Edit of {number} parameter{plural}, {num_megabytes(self):.3g} MB"

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("parameter", "shape", "kind", "norm", "MB")]
        for path, block in list(self.blocks.items())[:MAX_ROWS]:
            if not hasattr(block, "shape"):  # JAX puts other things in the place of arrays
                rows.append((path, "-", short(block), "-", "-"))
                continue
            kind = f"rank {block.rank}" if isinstance(block, LowRank) else "dense"
            shape = " x ".join(map(str, block.shape)) or "1"
            size = f"{num_megabytes(block):.3g}"
            rows.append((path, shape, f"{kind} {block.dtype}", _shown_norm(block), size))
        if (rest := len(self.blocks) - MAX_ROWS) > 0:
            rows.append((f"and {rest} more", "", "", "", ""))
        return rows

    def __add__(self, other: "Edit") -> "Edit":
        """Return the edit that does both; ValueError if they disagree on a shape."""
        if not isinstance(other, Edit):
            return NotImplemented
        blocks = dict(self.blocks)
        for path, delta in other.blocks.items():
            if path in blocks:
                _check_shape(path, "one edit", blocks[path], "the other", delta)
                dtype = _wide(blocks[path], delta)
                blocks[path] = added(blocks[path].astype(dtype), delta.astype(dtype))
            else:
                blocks[path] = delta
        return Edit(blocks)

    def __mul__(self, scale: Scalar) -> "Edit":
        """Return the edit `scale` times as large, in the blocks' own dtypes."""
        check_numbers(FINITE, scale=scale)

        def times(delta: Delta) -> Delta:
            dtype = _wide(delta)
            return scaled(delta.astype(dtype), jnp.asarray(scale, dtype)).astype(delta.dtype)

        return Edit({path: times(delta) for path, delta in self.blocks.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "Edit":
        """Return the edit that undoes this one."""
        return self * -1.0

    def __sub__(self, other: "Edit") -> "Edit":
        """Return this edit and the undoing of the other."""
        return self + (-other)


class CastLoss(NamedTuple):
    """The part of one block of an edit that rounding to the parameter's dtype took.

    Attributes:
        rounded_away: norm of the part that did not arrive, over the norm of the block; 0 to 1.
        swallowed: share of the nonzero entries of the block that changed nothing at all.
    """

    rounded_away: Float[Array, ""]
    swallowed: Float[Array, ""]

    __repr__ = short_repr


@on_auto_axes
def apply_edit(params: PyTree, edit: Edit, scale: Scalar = 1.0) -> PyTree:
    """Return params with `scale` times the edit added.

    Sums are formed in float32 or wider and returned in each parameter's own dtype; `cast_report`
    says what that costs.  Parameters that the edit does not name are returned as they are.

    Raises:
        ValueError: if the edit names a path that params lack or that is not real, or if a block has
            another shape than its parameter; or `scale` is not finite.
        FloatingPointError: if a block holds NaN or infinity.
    """
    check_numbers(FINITE, scale=scale)
    paths, leaves, treedef = _flatten(params)
    _check_paths(edit, paths, leaves)
    check_finite("the edit", edit.blocks, "nothing was applied")
    edited = [
        _edited(leaf, edit.blocks[path], scale) if path in edit.blocks else leaf
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, edited)


def revert_edit(params: PyTree, edit: Edit, scale: Scalar = 1.0) -> PyTree:
    """Return params with `scale` times the edit taken off: undoes `apply_edit` to one rounding."""
    return apply_edit(params, edit, -scale)


def edit_between(before: PyTree, after: PyTree, select: str | None = None) -> Edit:
    """Return the edit that turns `before` into `after`.

    It is what did happen: rounding before it, as in bfloat16 weights that were trained, is in it
    and `cast_report` finds nothing lost. Train float32 weights where small steps shall add up.

    Args:
        before: params.
        after: params of the same structure.
        select: regular expression; a parameter is taken if it is found in its path. None: all.

    Returns:
        One block per selected real parameter, changed or not, in float32 or wider.

    Raises:
        ValueError: if structures or shapes differ, or nothing is selected.
    """
    paths, leaves, treedef = _flatten(before)
    other_paths, other_leaves, other_treedef = _flatten(after)
    if treedef != other_treedef:
        differing = sorted(set(paths) ^ set(other_paths))
        raise ValueError(f"before and after differ in structure; paths in one only: {differing}")
    blocks = {}
    is_selected = matcher("" if select is None else select, "select")
    for path, old, new in zip(paths, leaves, other_leaves, strict=True):
        if not is_selected(path):
            continue
        _check_shape(path, "before", old, "after", new)
        if jnp.issubdtype(old.dtype, jnp.floating):
            blocks[path] = new.astype(_wide(old)) - old.astype(_wide(old))
    if not blocks:
        raise ValueError(f"select={select!r} matches no real parameter; paths: {paths}")
    return Edit(blocks)


@on_auto_axes
def edit_norms(edit: Edit) -> dict[str, Array]:
    """Return the Frobenius norm of each block, in float32 or wider."""
    return {path: _norm(dense(x).astype(_wide(x))) for path, x in edit.blocks.items()}


@on_auto_axes
def cast_report(params: PyTree, edit: Edit, scale: Scalar = 1.0) -> dict[str, CastLoss]:
    """Say, per path, what `apply_edit` with these arguments loses to the parameter's dtype.

    A bfloat16 weight has 8 bits: it swallows whatever is below 1/512 of itself. The methods that
    return an edit make it in float32 or wider, so that nothing of it is lost before.
    """
    check_numbers(FINITE, scale=scale)
    paths, leaves, _ = _flatten(params)
    _check_paths(edit, paths, leaves)
    report = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in edit.blocks:
            continue
        total = _sum(leaf, edit.blocks[path], scale)
        old = leaf.astype(total.dtype)
        wanted = dense(edit.blocks[path]).astype(total.dtype) * jnp.asarray(scale, total.dtype)
        arrived = total.astype(leaf.dtype).astype(total.dtype) - old
        norm, is_wanted = _norm(wanted), wanted != 0
        num_swallowed = jnp.sum(is_wanted & (arrived == 0)).astype(total.dtype)
        report[path] = CastLoss(
            rounded_away=_norm(wanted - arrived) / jnp.where(norm > 0, norm, 1),
            swallowed=num_swallowed / jnp.maximum(jnp.sum(is_wanted), 1).astype(total.dtype),
        )
    return report


def _flatten(params: PyTree) -> tuple[list[str], list[Array], Any]:
    check_params(params)
    named = parameter_paths(params)
    return [path for path, _ in named], [x for _, x in named], jax.tree.structure(params)


def _wide(*arrays: Delta) -> Any:
    """Return the dtype that sums are formed in: the widest among the arrays', float32 at least."""
    dtypes = [jnp.dtype(jnp.float32), *(x.dtype for x in arrays)]
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


def _sum(leaf: Array, delta: Delta, scale: Scalar) -> Array:
    dtype = _wide(leaf, delta)
    return leaf.astype(dtype) + jnp.asarray(scale, dtype) * dense(delta.astype(dtype))


def _edited(leaf: Array, delta: Delta, scale: Scalar) -> Array:
    place = sharding_of(leaf)
    if place is None:
        return _sum(leaf, delta, scale).astype(leaf.dtype)
    return _sharded_sum(leaf, _brought(delta, place), scale, place)


def _brought(delta: Delta, place: NamedSharding) -> Delta:
    """Return a block from other devices, as a file gives it: in pieces, or thin and whole."""
    whole = NamedSharding(place.mesh, PartitionSpec())
    target = whole if isinstance(delta, LowRank) else place

    def bring(x: Array) -> Array:
        is_here = isinstance(x, Tracer) or x.sharding.device_set == place.device_set
        return x if is_here else jax.device_put(x, target)

    return jax.tree.map(bring, delta)


@functools.partial(jax.jit, static_argnums=3)
def _sharded_sum(leaf: Array, delta: Delta, scale: Scalar, place: NamedSharding) -> Array:
    """Add a block in one program, which multiplies a thin one out in pieces, where they belong."""
    return jax.lax.with_sharding_constraint(_sum(leaf, delta, scale).astype(leaf.dtype), place)


def _shown_norm(block: Any) -> str:
    """Return the norm of a block in a few digits, if its numbers are there to be looked at."""
    if not all(map(is_concrete, jax.tree.leaves(block))):
        return "-"
    with jax.ensure_compile_time_eval():  # what is printed under jit is no part of the program
        if not isinstance(block, LowRank):
            return f"{float(_norm(jnp.asarray(block).astype(_wide(block)))):.3g}"
        left, right = (x.astype(_wide(block)) for x in (block.left, block.right))
        grams = (
            jnp.einsum(spec, x, x, precision=HIGHEST)
            for spec, x in (("...dr,...ds->...rs", left), ("...rd,...sd->...rs", right))
        )
        square = jnp.sum(functools.reduce(jnp.multiply, grams))
        return f"{float(jnp.sqrt(jnp.maximum(square, 0))):.3g}"


def _norm(x: Array) -> Array:
    largest = jnp.max(jnp.abs(x), initial=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)  # small squares are zero
    return unit * jnp.sqrt(jnp.sum(jnp.square(x / unit)))


def _check_paths(edit: Edit, paths: list[str], leaves: list[Array]) -> None:
    check_kind(edit, Edit, "edit", "of `edit_between` or a method")
    known = dict(zip(paths, leaves, strict=True))
    for path, delta in edit.blocks.items():
        if path not in known:
            raise ValueError(f"the edit names {path!r}, which params lack; {nearest(path, paths)}")
        _check_shape(path, "the edit", delta, "params", known[path])
        if not jnp.issubdtype(known[path].dtype, jnp.floating):
            raise ValueError(
                f"{path} has dtype {known[path].dtype}; only real parameters are edited"
            )


def _check_shape(path: str, one: str, a: Delta, other: str, b: Delta) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{path}: {one} has shape {a.shape}, {other} {b.shape}")
