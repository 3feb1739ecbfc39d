"""Which parameters of a folder's model are edited, and where methods look at it."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import PyTree

from jedit.core.paths import matcher, parameter_paths

# The matrices of the blocks: what an embedding or a norm has learned serves every row.
SELECT = r"^layers/\d+/(attn|mlp)/"
SHOWN = 12  # of the paths that there are


def edited_pattern(params: PyTree, select: str | None, layers: Sequence[int]) -> str | None:
    """Return the pattern of the parameters to edit; None where nothing was asked for.

    Args:
        params: the model's parameters.
        select: a regular expression of their paths, or None.
        layers: numbers of blocks whose matrices are edited; empty: none are named.

    Raises:
        ValueError: both are given, or nothing matches; it says what there is.
    """
    if select is not None and layers:
        raise ValueError("--select and --layers say the same thing in two ways; give one of them")
    paths = [p for p, x in parameter_paths(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    if layers:
        there = sorted({int(m[1]) for p in paths if (m := re.match(r"layers/(\d+)/", p))})
        if lacking := sorted(set(layers) - set(there)):
            found = f"{there[0]} to {there[-1]}" if there else "none"
            raise ValueError(f"--layers: there is no block {lacking[0]}; the model has {found}")
        return rf"^layers/({'|'.join(map(str, sorted(set(layers))))})/(attn|mlp)/"
    if select is None:
        return None
    is_found = matcher(select, "--select")
    if not any(map(is_found, paths)):
        kinds = list(dict.fromkeys(re.sub(r"\d+", "N", path) for path in paths))
        more = ", ..." if len(kinds) > SHOWN else ""
        raise ValueError(
            f"--select {select!r} names no parameter; there are, with N for a number, "
            f"{', '.join(kinds[:SHOWN])}{more}"
        )
    return select


def hidden_site(params: PyTree) -> str:
    """Return the site whose input is the hidden state of RMU: where the last perceptron begins."""
    found = in_order(params, r"^layers/(\d+)/mlp/gate_proj/kernel$")
    return (found or in_order(params, r"^layers/(\d+)/mlp/up_proj/kernel$"))[-1]


def written_layers(params: PyTree) -> tuple[str, ...]:
    """Return by depth the matrices that AlphaEdit and MEMIT edit: where a perceptron ends."""
    return in_order(params, r"^layers/(\d+)/mlp/down_proj/kernel$")


def in_order(params: PyTree, pattern: str) -> tuple[str, ...]:
    """Return the paths of that form, by the number in them."""
    found = [m for path, _ in parameter_paths(params) if (m := re.search(pattern, path))]
    return tuple(match[0] for match in sorted(found, key=lambda match: int(match[1])))
