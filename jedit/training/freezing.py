"""The parameters that are trained, apart from those that are not."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jedit.core.paths import matcher, parameter_paths


def which_are_trained(params: PyTree, trainable: str | None) -> tuple[bool, ...]:
    """Return, leaf by leaf, whether it is trained; what is not real never is.

    Raises:
        ValueError: no leaf is trained.
    """
    named = parameter_paths(params)
    is_found = matcher("" if trainable is None else trainable, "trainable")
    chosen = tuple(
        jnp.issubdtype(leaf.dtype, jnp.floating) and is_found(path) for path, leaf in named
    )
    if not any(chosen):
        paths = [path for path, _ in named]
        raise ValueError(f"trainable={trainable!r} matches no real parameter; paths: {paths}")
    return chosen


def split(params: PyTree, is_trained: tuple[bool, ...]) -> PyTree:
    """Return params with None, which is no leaf, in place of what is frozen; paths stay."""
    leaves, treedef = jax.tree.flatten(params)
    kept = [leaf if chosen else None for leaf, chosen in zip(leaves, is_trained, strict=True)]
    return jax.tree.unflatten(treedef, kept)


def merge(trained: PyTree, params: PyTree, is_trained: tuple[bool, ...]) -> PyTree:
    """Return params with the trained leaves put in: what `split` took apart."""
    leaves, treedef = jax.tree.flatten(params)
    new = treedef.flatten_up_to(trained)
    merged = [n if chosen else p for n, p, chosen in zip(new, leaves, is_trained, strict=True)]
    return jax.tree.unflatten(treedef, merged)
