"""(F + λ)⁻¹ as a value: what a damping makes of a curvature, made once for many solves.

Where a block has its eigenvectors that is nothing: its eigenvalues are damped as they are used.
Where its factors were not decomposed, both are damped and inverted apart (`factored`).
"""

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_kind, check_word
from jedit.core.checks import NOT_NEGATIVE, check_numbers, is_known
from jedit.core.devices import is_on_host, offloaded, on_auto_axes
from jedit.core.display import short_repr
from jedit.curvature import factored, newton_schulz
from jedit.curvature.algebra import (
    BlockMap,
    apply_blocks,
    damped,
    factored_map,
    gather,
    is_undecomposed,
    spectral,
)
from jedit.curvature.checks import check_covers, check_has, check_layers_finite
from jedit.curvature.types import Curvature, Diagonal, Factor, Kronecker, Uncovered, pytree


@pytree("absolute", "uncovered")
@dataclasses.dataclass(frozen=True)
class Inverted:
    """(F + λ)⁻¹: called on a tree shaped like params it returns the solution, as `solve` does.

    Attributes:
        blocks: by name, those of the curvature; the factors of undecomposed ones are named here as
            their inverses are.
        decomposed: the part of the curvature that has eigenvectors.
        inverses: of the factors that have none, damped.
        damping: λ.
        absolute: static; whether λ is in units of the eigenvalues themselves.
        uncovered: static; what becomes of parameters without a block.
    """

    blocks: Mapping[str, Kronecker | Diagonal]
    decomposed: Curvature
    inverses: Mapping[str, factored.Damped]
    damping: Array
    absolute: bool = False
    uncovered: Uncovered = "zero"

    __repr__ = short_repr

    @property
    def covered(self) -> tuple[str, ...]:
        """Return paths of the parameters it covers."""
        return tuple(dict.fromkeys(p for b in self.blocks.values() for p in b.weight.paths))

    def __call__(self, tree: PyTree) -> PyTree:
        """Return (F + λ)⁻¹ T, in the dtypes of T.

        Raises:
            ValueError: the tree lacks a covered parameter, or has it in another shape.
        """
        return _solved(self, tree)

    def again(self, curvature: Curvature) -> "Inverted":
        """Return the same of another curvature."""
        how = {"absolute": self.absolute, "uncovered": self.uncovered}
        return inverted(curvature, damping=self.damping, **how)


@on_auto_axes
def inverted(
    curvature: Curvature,
    *,
    damping: float | Array,
    absolute: bool = False,
    uncovered: Uncovered = "zero",
) -> Inverted:
    """Return (F + λ)⁻¹, to be called on as many trees as one likes.

    A curvature with eigenvectors is kept as it is. Of one without, by "cholesky" or "inverse",
    every dense factor is inverted, d³/3 flops by Cholesky and some 30 d³ by products, and
    held beside its matrix: in the same memory, the host's where `to_host` put that, from which a
    block's inverses are fetched when it is solved. A solve then costs 2 d_in d_out (d_in + d_out)
    flops a block.

    Args:
        curvature: F, as `estimate` returns it.
        damping: λ, in units of each block's mean eigenvalue; another one needs no other pass. It is
            put on both factors of an undecomposed block, and cannot be zero there.
        absolute: λ is in units of the eigenvalues themselves, the same for every block.
        uncovered: parameters without a block become "zero" (frozen), or pass as by "identity".

    Returns:
        The inverse. A factor whose inverse by products has too large a residual is inverted by
        Cholesky, with a warning that names its block; under a trace there is no warning, and the
        residual stands in `inverses`.

    Raises:
        TypeError: the curvature is something else.
        ValueError: a damping that is negative or not finite, or zero where it cannot be; another
            word for `uncovered`.
        FloatingPointError: a damped factor has no inverse in its dtype, for want of damping; its
            block is named. Under a trace the inverse is then not finite.
    """
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_word(Uncovered, uncovered=uncovered)
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    check_invertible(curvature, damping)
    names = inverse_names(curvature, absolute)
    inverses: dict[str, factored.Damped] = {}
    blocks, warned = dict(curvature.blocks), []
    for name, keys in names.items():
        warned += _add_inverses(inverses, curvature, name, keys, damping, absolute)
        block = _kronecker(curvature, name)
        for key, end in zip(keys, (block.input, block.output), strict=True):
            inverses[key] = _beside(inverses[key], curvature.factors[end])
        blocks[name] = dataclasses.replace(block, input=keys[0], output=keys[1])
    for sentence in warned:
        warnings.warn(sentence, stacklevel=3)  # the caller's line, behind `on_auto_axes`
    rest = {n: b for n, b in curvature.blocks.items() if n not in names}
    ends = {f for b in rest.values() if isinstance(b, Kronecker) for f in (b.input, b.output)}
    factors = {name: factor for name, factor in curvature.factors.items() if name in ends}
    decomposed = Curvature(rest, factors, curvature.num_outputs)
    return Inverted(blocks, decomposed, inverses, jnp.asarray(damping, float), absolute, uncovered)


@on_auto_axes
def solve(
    curvature: Curvature,
    tree: PyTree,
    *,
    damping: float | Array,
    absolute: bool = False,
    uncovered: Uncovered = "zero",
) -> PyTree:
    """Return (F + λ)⁻¹ T, exact in the eigenbasis. Costs 4 d_in d_out (d_in + d_out) flops a block.

    It is `inverted(curvature, damping=damping)(tree)`, which serves many trees at one damping, in
    less memory: factors without eigenvectors are inverted when the first block that has them is
    solved, and the inverse is dropped after the last.

    Args:
        curvature: F, as `estimate` returns it.
        tree: a pytree shaped like params, e.g. a gradient.
        damping: λ, in units of each block's mean eigenvalue; directions of zero eigenvalue are left
            at zero when it is zero. Factors without eigenvectors are damped apart, and by no zero.
        absolute: λ is in units of the eigenvalues themselves, the same for every block.
        uncovered: parameters without a block become "zero" (frozen), or pass as by "identity".

    Returns:
        A pytree like `tree`, in its dtypes.

    Raises:
        ValueError: the tree lacks a covered parameter, or has it in another shape; or a damping
            that is negative or not finite.
        FloatingPointError: a damped factor has no inverse in its dtype, for want of damping.
    """
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_word(Uncovered, uncovered=uncovered)
    leaves = check_covers(curvature, tree)
    check_invertible(curvature, damping)
    warned: list[str] = []

    def maps() -> Iterator[BlockMap]:
        names = inverse_names(curvature, absolute)
        uses = Counter(key for keys in names.values() for key in keys)
        inverses: dict[str, factored.Damped] = {}
        for name in curvature.blocks:
            if name not in names:
                yield _spectral_inverse(curvature, name, damping, absolute)
                continue
            keys = names[name]
            warned.extend(_add_inverses(inverses, curvature, name, keys, damping, absolute))
            uses.subtract(keys)
            # What serves no other block is held by this one's map alone, which is soon dropped.
            first, second = (inverses[key] if uses[key] else inverses.pop(key) for key in keys)
            yield factored_map(_kronecker(curvature, name), (first, second))
            del first, second

    found = apply_blocks(maps(), tree, leaves, uncovered=uncovered)
    for sentence in warned:
        warnings.warn(sentence, stacklevel=3)  # the caller's line, behind `on_auto_axes`
    return found


@on_auto_axes
def _solved(inverse: Inverted, tree: PyTree) -> PyTree:
    leaves = check_has((block.weight for block in inverse.blocks.values()), tree, "curvature")

    def block_map(name: str) -> BlockMap:
        block = inverse.blocks[name]
        if name in inverse.decomposed.blocks:
            return _spectral_inverse(inverse.decomposed, name, inverse.damping, inverse.absolute)
        assert isinstance(block, Kronecker)  # a diagonal has its eigenvectors
        return factored_map(block, (inverse.inverses[block.input], inverse.inverses[block.output]))

    maps = map(block_map, inverse.blocks)
    return apply_blocks(maps, tree, leaves, uncovered=inverse.uncovered)


def _spectral_inverse(
    curvature: Curvature, name: str, damping: float | Array, absolute: bool
) -> BlockMap:
    # Guarded twice: in `where`, the branch not taken still makes the NaN of a gradient.
    def invert(values):
        is_zero = values == 0
        return jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, values))

    values, turn = damped(curvature, name, damping, absolute)
    block, values = curvature.blocks[name], jax.tree.map(invert, values)
    return spectral(block.weight, values, functools.partial(gather, block), turn)


def inverse_names(curvature: Curvature, absolute: bool = False) -> dict[str, tuple[str, str]]:
    """Return by undecomposed block what the inverses of its two factors are called.

    Blocks that share a factor share its inverse, where that is the same.
    """
    names: dict[str, tuple[str, str]] = {}
    known: dict[tuple, str] = {}
    for name in curvature.blocks:
        if not is_undecomposed(curvature.blocks[name], curvature):
            continue
        block, keys = _kronecker(curvature, name), []
        for end in (block.input, block.output):
            # In units of the mean eigenvalue a factor's λ is its own; else it is of one block. And
            # blocks that lie differently on a mesh each have theirs cut as they are.
            one = (end, block.sharding, name if absolute else None)
            is_other = absolute or any(other[0] == end for other in known)
            keys.append(known.setdefault(one, f"{end} of {name}" if is_other else end))
        names[name] = (keys[0], keys[1])
    return names


def _add_inverses(
    inverses: dict[str, factored.Damped],
    curvature: Curvature,
    name: str,
    keys: tuple[str, str],
    damping: float | Array,
    absolute: bool,
) -> list[str]:
    """Invert those of a block's two factors that are not there yet, and return what to warn of.

    Raises:
        FloatingPointError: a damped factor has no inverse in its dtype.
    """
    block = _kronecker(curvature, name)
    levels = factored.damped_levels(curvature, block, damping, absolute)
    ends, warned = (block.input, block.output), []
    for dim, (key, end, level) in enumerate(zip(keys, ends, levels, strict=True), 1):
        if key not in inverses:
            factor = curvature.factors[end]
            inverses[key] = factored.inverse(factor, level, block.sharding, dim)
            warned += _checked_side(inverses[key], factor.dimension, name, damping)
    return warned


def _beside(side: factored.Damped, factor: Factor) -> factored.Damped:
    """Return an inverse in the host's memory, if its factor's matrix lies there."""
    is_there = factor.matrix is not None and is_on_host(factor.matrix)
    if not is_there or isinstance(side.values, Tracer):
        return side
    return dataclasses.replace(side, values=offloaded(side.values))


def _kronecker(curvature: Curvature, name: str) -> Kronecker:
    block = curvature.blocks[name]
    assert isinstance(block, Kronecker)  # a diagonal has its eigenvectors
    return block


def check_invertible(curvature: Curvature, damping: float | Array) -> None:
    """Refuse no damping where factors are inverted.

    Raises:
        ValueError: the damping is zero, and a block has no eigenvectors.
    """
    if not is_known(damping) or np.all(np.asarray(damping) > 0):
        return
    for name, block in curvature.blocks.items():
        if is_undecomposed(block, curvature):
            raise ValueError(
                f"the curvature of {name!r} was kept without eigenvectors, and its factors, which "
                "may be singular, are inverted: give a damping above zero, or estimate it by "
                'factorize="eigh"'
            )


def _checked_side(
    side: factored.Damped, dimension: int, name: str, damping: float | Array
) -> list[str]:
    if isinstance(side.values, Tracer):
        return []
    hint = (
        f"in {side.values.dtype} a factor of {dimension} x {dimension} is not positive definite at "
        f"damping={damping}; give more damping"
    )
    check_layers_finite(side.values, name, hint, "inverted curvature")
    if side.form != "matrix" or not is_known(side.residual):
        return []
    residual = float(np.max(np.asarray(side.residual)))
    least = newton_schulz.tolerance(side.values.dtype)
    if residual <= least:
        return []
    return [
        f"the curvature of {name!r} ({dimension} x {dimension}) was inverted by Cholesky: by "
        f"products of matrices a residual of {residual:.1e} was left, above {least:.1e}; more "
        "damping makes it converge"
    ]
