"""Parts that engrams in two metrics share: groups, strengths, and the edit out of the pieces."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_word
from jedit.core.checks import POSITIVE, check_finite, check_numbers, culprit
from jedit.core.display import short_repr
from jedit.curvature.checks import matrix_of
from jedit.edits import Edit
from jedit.methods._two_sets import Parts, add_changes, comparable

Strength = Literal["adaptive", "whole"]


class EngramInfo(NamedTuple):
    """Measurements of an engram that was taken out, by block.

    Attributes:
        relative_norm: ‖W₊‖ / ‖W‖ of every layer of a block, without the bias's row, (layers,).
        strength: f of every layer of a block, (layers,).
    """

    relative_norm: dict[str, Array]
    strength: dict[str, Array]

    __repr__ = short_repr


def take_out(
    params: PyTree, target: Parts, rest: Parts, piece: Callable, *, strength: Strength, scale: float
) -> tuple[Edit, EngramInfo]:
    """Return the edit -α f W₊ of every Kronecker block.

    Args:
        params: the parameters W.
        target: curvature of what is to be forgotten, or of several disjoint parts of it.
        rest: curvature of all other data, or of several disjoint parts of it.
        piece: `(targets, rests, name, weight) -> W₊`, the groups as lists; weight and W₊ are
            (layers, rows, d_out).
        strength: how f is chosen, "adaptive" or "whole".
        scale: the factor α.

    Returns:
        The edit, and each block's relative norms and strengths.

    Raises:
        TypeError: an argument that holds no parameters or curvatures.
        ValueError: an unknown strength, nothing in a group, curvatures of different sites or of no
            outputs, no Kronecker block, or a parameter that is used at several sites.
        FloatingPointError: parameters, or the edit, are not finite.
    """
    check_word(Strength, strength=strength)
    check_numbers(POSITIVE, scale=scale)
    targets, rests, blocks, leaves = comparable(params, target, rest, "an engram")
    found, relative = {}, {}
    for name, block in blocks.items():
        dtype = matrix_of(targets[0].factors[block.input], name).dtype
        weight = block.weight.gather({p: leaves[p].astype(dtype) for p in block.weight.paths})
        found[name] = piece(targets, rests, name, weight)
        # Without the bias's row: its units are not the kernel's, and a large bias would set f
        # alone.
        kernels = (m[:, : block.weight.d_in] for m in (weight, found[name]))
        size, kept = (jnp.sqrt(jnp.sum(m**2, axis=(1, 2))) for m in kernels)
        relative[name] = kept / jnp.where(size > 0, size, 1)
    strengths = _strengths(strength, relative)
    changes: dict[str, Array] = {}
    for name, block in blocks.items():
        taken = -scale * strengths[name][:, None, None] * found[name]
        add_changes(changes, block.weight.scatter(taken))
    check_finite("the engram", changes, lambda: culprit(params, {}))
    return Edit(changes), EngramInfo(relative, strengths)


def is_kept(eigenvalues: Array) -> Array:
    """Say which of a sum of moments' ascending eigenvalues are above rounding.

    The moments are of activations that a model computed in float32 or narrower, whatever dtype they
    are held in: below d times float32's epsilon of the largest they are noise, in float64 as well,
    and their inverse would make engrams of many times the weight's size.
    """
    return eigenvalues > len(eigenvalues) * float(np.finfo(np.float32).eps) * eigenvalues[-1]


def _strengths(strength: Strength, relative: dict[str, Array]) -> dict[str, Array]:
    if strength == "whole":
        return {name: jnp.ones_like(r) for name, r in relative.items()}
    # Over all blocks, not in each: f compares the matrices of a network with one another.
    largest = max(float(jnp.max(r)) for r in relative.values())
    return {name: r / max(largest, float(np.finfo(r.dtype).tiny)) for name, r in relative.items()}
