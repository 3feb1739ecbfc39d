"""The paths by which parameters are named; this module imports nothing from jedit."""

from typing import Any

import jax
from jaxtyping import PyTree


def parameter_paths(params: PyTree, separator: str = "/") -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, in flattening order.

    Raises:
        ValueError: two leaves have one path, as those of `{"a": {"b": W}, "a/b": V}`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = [(jax.tree_util.keystr(p, simple=True, separator=separator), x) for p, x in leaves]
    paths = [path for path, _ in named]
    if len(set(paths)) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"several parameters share one path: {twice}; rename them")
    return named
