"""Let an update change salient parameters alone: u_i <- 0 unless |g_i| is among the largest.

g is a gradient taken once, before the first step: that of the forget loss is SalUn's saliency
(arXiv 2310.12508).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jedit.core.checks import SHARE, check_numbers
from jedit.core.devices import on_auto_axes


class MaskToSalientState(NamedTuple):
    """The mask of entries that may change, as an argument of the jitted step."""

    mask: PyTree


def mask_to_salient(
    gradient: PyTree, fraction: float = 0.5
) -> optax.GradientTransformationExtraArgs:
    """Set the updates of all but the most salient parameters to zero.

    Stands last, after Adam, momentum and weight decay, each of which would move the others:

        optax.chain(optax.adamw(1e-4), mask_to_salient(gradient))

    Args:
        gradient: g, a tree like params, with arrays or Flax's variables at its leaves whichever of
            them the optimizer sees; its magnitudes alone are used.
        fraction: share of all entries together that may change, 0 to 1, rounded to a whole number
            of them (SalUn: 0.5); of equal ones the first.

    Returns:
        The transform. `init` sorts once; the state costs one byte a parameter.

    Raises:
        ValueError: a fraction outside 0 to 1; at `init`, params that it lacks, or of another shape.
    """
    check_numbers(SHARE, fraction=fraction)

    def init(params) -> Any:
        known = _by_path(gradient)

        def magnitude(path, p):
            if p is None:  # not trained
                return None
            g = _found(known, path)
            if p.shape != g.shape:
                raise ValueError(f"the gradient has shape {g.shape} for params of {p.shape}")
            return jnp.abs(g).astype(jnp.float32)

        sizes = jax.tree_util.tree_map_with_path(magnitude, params, is_leaf=lambda p: p is None)
        return MaskToSalientState(_largest(sizes, fraction))

    def update(updates, state, params=None, **extra_args) -> Any:
        del params, extra_args
        return jax.tree.map(lambda u, m: jnp.where(m, u, 0), updates, state.mask), state

    return optax.GradientTransformationExtraArgs(init, update)


def _by_path(tree: PyTree) -> dict[tuple[str, ...], Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {_names(path): leaf for path, leaf in found}


def _names(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _found(known: dict[tuple[str, ...], Any], path: jax.tree_util.KeyPath) -> Any:
    """Return the leaf of this path; a Flax variable's array has one more key than the bare array.

    Raises:
        ValueError: no leaf has this path.
    """
    names = _names(path)
    wrapped = [leaf for other, leaf in known.items() if other[:-1] == names]
    for other in (names, names[:-1]):
        if other in known:
            return known[other]
    if len(wrapped) == 1:
        return wrapped[0]
    raise ValueError(
        f"the gradient has no leaf {'/'.join(names)!r}, which is trained; its leaves are "
        f"{', '.join('/'.join(other) for other in list(known)[:6])}"
    )


@on_auto_axes
def _largest(sizes: PyTree, fraction: float) -> PyTree:
    """Mark the largest entries of all leaves together."""
    leaves, treedef = jax.tree.flatten(sizes)
    flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
    order = jnp.argsort(-flat)
    mask = jnp.zeros(flat.shape, bool).at[order[: round(fraction * flat.size)]].set(True)
    parts = jnp.split(mask, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return treedef.unflatten(
        [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )
