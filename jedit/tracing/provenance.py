"""Provenance: which parameter leaf a value is, and how it was laid out since.

A value has provenance p when it is parameter leaf p after operations that only move, cast, slice or
scale its entries. Such a value is described by

    ops    relayouts from the leaf to a *core* array (a slice of a stacked leaf, a reshape, ...)
    view   for every axis of the value, the core axis it is, or None where it was broadcast
    scale  a constant factor

so that a bias broadcast over a batch and a weight transposed before use are both still "the leaf".
Operations are hashable tuples, because they end up in static metadata of jitted functions.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# ("transpose", perm) | ("reshape", shape) | ("slice", start, limit, stride) | ("layer", depth)
Op = tuple


def apply_ops(ops: tuple[Op, ...], leaf: Array) -> Array:
    """Lay out a leaf; an axis that a scan slices ("layer") stays in front of what follows it."""
    for i, (name, *arguments) in enumerate(ops):
        if name == "layer":
            # What follows was recorded inside the scan, of one layer: it is mapped over all.
            return jax.vmap(lambda x, rest=ops[i + 1 :]: apply_ops(rest, x))(leaf)
        if name == "transpose":
            leaf = jnp.transpose(leaf, arguments[0])
        elif name == "reshape":
            leaf = jnp.reshape(leaf, arguments[0])
        else:
            leaf = jax.lax.slice(leaf, *arguments)
    return leaf


def view_ops(ops: tuple[Op, ...], leaf: np.ndarray) -> np.ndarray:
    """Lay out a NumPy array as `apply_ops` does, as a view of it wherever NumPy has one."""
    kept = 0  # axes of scans, which stay in front of what follows
    for name, *arguments in ops:
        lead = leaf.shape[:kept]
        if name == "layer":
            kept += 1
        elif name == "transpose":
            leaf = leaf.transpose(*range(kept), *(kept + axis for axis in arguments[0]))
        elif name == "reshape":
            leaf = leaf.reshape(*lead, *arguments[0])
        else:
            start, stop, strides = arguments
            steps = strides or (1,) * len(start)
            leaf = leaf[(slice(None),) * kept + tuple(map(slice, start, stop, steps))]
    return leaf


def transpose_ops(ops: tuple[Op, ...], value: Array, shape: tuple[int, ...]) -> Array:
    """Apply the adjoint of `apply_ops`: entries go back where they came from, others are zero."""
    leaf = jax.ShapeDtypeStruct(shape, value.dtype)
    return jax.linear_transpose(lambda x: apply_ops(ops, x), leaf)(value)[0]


@dataclasses.dataclass(frozen=True)
class Provenance:
    """A value that is a parameter leaf up to layout, broadcast and a constant factor."""

    path: str
    leaf_shape: tuple[int, ...]
    ops: tuple[Op, ...]
    core_shape: tuple[int, ...]
    view: tuple[int | None, ...]
    shape: tuple[int, ...]
    scale: float = 1.0

    @classmethod
    def of_leaf(cls, path: str, shape: tuple[int, ...]) -> "Provenance":
        """Return a parameter leaf as it is."""
        return cls(path, shape, (), shape, tuple(range(len(shape))), shape)

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the leaf's path alone in a tuple, as `Joined` returns several."""
        return (self.path,)

    @property
    def is_broadcast(self) -> bool:
        """Say whether some axis was expanded, so that it is no longer a weight to contract."""
        return any(c is None and n != 1 for c, n in zip(self.view, self.shape, strict=True))

    @property
    def layer_depths(self) -> tuple[int, ...]:
        """Return the nesting depths of the scans that slice the leaf, outermost first."""
        return tuple(op[1] for op in self.ops if op[0] == "layer")

    def scaled(self, factor: float) -> "Provenance":
        """Return the value times a constant."""
        return dataclasses.replace(self, scale=self.scale * factor)

    def feature_ops(self) -> tuple[Op, ...]:
        """Return relayouts from the leaf to the core's long axes, in the order of the view.

        Whether an axis of size one was broadcast depends on the batch; leaving it out keeps the
        relayouts the same for every batch.
        """
        order = [c for c in self.view if c is not None and self.core_shape[c] != 1]
        rest = [c for c in range(len(self.core_shape)) if c not in order]  # all of size one
        perm = () if order == sorted(order) else (("transpose", (*rest, *order)),)
        shape = tuple(self.core_shape[c] for c in order)
        return simplified((*self.ops, *perm, ("reshape", shape)))

    def materialized(self) -> "Provenance":
        """Fold the view into the relayouts; the value must not be truly broadcast."""
        if self.view == tuple(range(len(self.core_shape))):
            return self
        ops = (*self.feature_ops(), ("reshape", self.shape))
        view = tuple(range(len(self.shape)))
        return dataclasses.replace(self, ops=ops, core_shape=self.shape, view=view)

    def transposed(self, permutation: tuple[int, ...]) -> "Provenance":
        """Return the value after `transpose`."""
        view = tuple(self.view[i] for i in permutation)
        return dataclasses.replace(self, view=view, shape=tuple(self.shape[i] for i in permutation))

    def broadcast(self, shape: tuple[int, ...], dims: tuple[int, ...]) -> "Provenance":
        """Return the value after `broadcast_in_dim`."""
        view: list[int | None] = [None] * len(shape)
        for axis, core in zip(dims, self.view, strict=True):
            if core is not None and self.core_shape[core] == shape[axis]:
                view[axis] = core
        return dataclasses.replace(self, view=tuple(view), shape=shape)

    def reshaped(self, shape: tuple[int, ...]) -> "Provenance | None":
        """Return the value after `reshape`; None if a broadcast axis would merge with another."""
        if not self.is_broadcast:
            base = self.materialized()
            ops = simplified((*base.ops, ("reshape", shape)))
            view = tuple(range(len(shape)))
            return dataclasses.replace(base, ops=ops, core_shape=shape, view=view, shape=shape)
        relaid: list[int | None] = []
        for old, new in axis_groups(self.shape, shape):
            cores = [self.view[i] for i in old if self.shape[i] != 1]
            long = [j for j in new if shape[j] != 1]
            if any(c is not None for c in cores) and (len(cores), len(long)) != (1, 1):
                return None
            relaid += [cores[0] if j in long and cores else None for j in new]
        return dataclasses.replace(self, view=tuple(relaid), shape=shape)

    def sliced(self, start, limit, strides) -> "Provenance | None":
        """Return the value after `slice`; None when it is broadcast (nobody writes that)."""
        if self.is_broadcast:
            return None
        base = self.materialized()
        strides = strides or (1,) * len(start)
        shape = tuple(math.ceil((b - a) / s) for a, b, s in zip(start, limit, strides, strict=True))
        ops = (*base.ops, ("slice", tuple(start), tuple(limit), tuple(strides)))
        return dataclasses.replace(base, ops=ops, core_shape=shape, shape=shape)

    def scanned(self, depth: int) -> "Provenance":
        """Return one iteration's slice of a value that a scan takes apart along its first axis."""
        if self.view and self.view[0] is None:
            return dataclasses.replace(self, view=self.view[1:], shape=self.shape[1:])
        if self.is_broadcast:
            # Only the leading axis must lead the core; the broadcast axes stay in the view.
            core = self.view[0]
            perm = (core, *(c for c in range(len(self.core_shape)) if c != core))
            ops = (*self.ops, ("transpose", perm), ("layer", depth))
            place = {c: i - 1 for i, c in enumerate(perm)}
            view = tuple(None if c is None else place[c] for c in self.view[1:])
            core_shape = tuple(self.core_shape[c] for c in perm[1:])
        else:
            base = self.materialized()
            ops = (*base.ops, ("layer", depth))
            view, core_shape = tuple(range(len(self.shape) - 1)), self.shape[1:]
        return dataclasses.replace(
            self, ops=ops, view=view, core_shape=core_shape, shape=self.shape[1:]
        )


def axis_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Match the axes before and after a reshape in the smallest groups of equal size."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        size_old, size_new, i0, j0 = 1, 1, i, j
        # On equal sizes the old side goes on first, so that an axis of length one has a group.
        while size_old != size_new or (i, j) == (i0, j0):
            if j == len(new) or (i < len(old) and size_old <= size_new):
                size_old, i = size_old * old[i], i + 1
            else:
                size_new, j = size_new * new[j], j + 1
        groups.append((list(range(i0, i)), list(range(j0, j))))
    return groups


def simplified(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """Drop identity transposes and all but the last of consecutive reshapes."""
    out: list[Op] = []
    for op in ops:
        if op[0] == "transpose" and tuple(op[1]) == tuple(range(len(op[1]))):
            continue
        if op[0] == "reshape" and out and out[-1][0] == "reshape":
            out.pop()
        out.append(op)
    return tuple(out)
