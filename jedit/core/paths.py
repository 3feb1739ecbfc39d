"""The paths by which parameters are named, "layers/0/kernel", and how some of them are chosen."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from jedit.core.display import described


def leaves_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """Return (path, leaf) of every leaf, in flattening order; two leaves may have one path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]


def parameter_paths(params: PyTree) -> list[tuple[str, Any]]:
    """Return (path, leaf) of every leaf, in flattening order; no two leaves have one path.

    Raises:
        ValueError: two leaves have one path, as those of `{"a": {"b": W}, "a/b": V}`.
    """
    named = leaves_with_paths(params)
    paths = [path for path, _ in named]
    if len(set(paths)) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"several parameters share one path: {twice}; rename them")
    return named


def matcher(patterns: str | Sequence[str], name: str) -> Callable[[str], bool]:
    """Return a function of a text that says whether one of several patterns is found in it.

    Raises:
        TypeError: the patterns are no texts.
        ValueError: a pattern is no regular expression.
    """
    several = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(several, Iterable) or not all(isinstance(x, str) for x in several):
        raise TypeError(
            f"{name} must be a regular expression, or several in a list, got {described(patterns)}"
        )
    compiled = []
    for pattern in several:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"{name}: {pattern!r} is no regular expression ({error}); re.escape makes one of a "
                "plain text"
            ) from None
    return lambda text: any(pattern.search(text) for pattern in compiled)


def selected_paths(paths: list[str], select: str | Sequence[str] | None) -> list[str]:
    """Return the paths in which one of some regular expressions is found; None: all.

    Raises:
        TypeError: the patterns are no texts.
        ValueError: a pattern is no regular expression, or is found in no path.
    """
    if select is None:
        return paths
    is_selected = matcher(select, "select")
    for pattern in [select] if isinstance(select, str) else select:
        if not any(map(matcher(pattern, "select"), paths)):
            known = ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
            raise ValueError(
                f"select: {pattern!r} matches no parameter; the parameters are: {known}"
            )
    return [path for path in paths if is_selected(path)]


def exactly(paths: Iterable[str]) -> list[str]:
    """Return the `select` that names these parameters and no others."""
    return [f"^{re.escape(path)}$" for path in paths]
