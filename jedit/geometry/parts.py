"""Some of a model's parameters, by path: taken out, put back, moved.

    θ' = round(θ + Δ_p)      at every path p of the move, and the same array everywhere else

A move holds what changes and nothing else, so that nothing of the model's size is made for it.
Paths are those of `jedit.core.paths.parameter_paths`.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.paths import parameter_paths
from jedit.core.precision import wide, wide_dtype

Part = dict[str, Array]


def part_of(params: PyTree, paths: Iterable[str]) -> Part:
    """Return the parameters of these paths, in the order of `params`; others are not named."""
    chosen = set(paths)
    return {path: leaf for path, leaf in dict(parameter_paths(params)).items() if path in chosen}


def with_part(params: PyTree, part: Mapping[str, Array]) -> PyTree:
    """Return `params` with the part in place; all other leaves are the same arrays.

    Raises:
        ValueError: the part names a path that `params` lack, or has it in another shape.
    """
    leaves = dict(parameter_paths(params))
    _check(leaves, part)
    return jax.tree.unflatten(jax.tree.structure(params), list({**leaves, **part}.values()))


def ahead(start: Mapping[str, Array], move: Mapping[str, Array], alpha: float | Array) -> Part:
    """Return start + alpha·move in float32 or wider; either may name paths that the other lacks."""
    total = {path: wide(change) for path, change in start.items()}
    for path, d in move.items():
        far = jnp.asarray(alpha, wide(d).dtype) * wide(d)
        total[path] = total[path] + far if path in total else far
    return total


def moved(params: PyTree, move: Mapping[str, Array], alpha: float | Array = 1.0) -> PyTree:
    """Return params + alpha·move, rounded once to the params' own dtypes, as `apply_edit` does it.

    Raises:
        ValueError: the move names a path that `params` lacks, or has another shape.
    """
    _check(dict(parameter_paths(params)), move)
    far = ahead({}, move, alpha)
    here = part_of(params, move)
    return with_part(params, {path: _sum(param, far[path]) for path, param in here.items()})


def _sum(param: Array, change: Array) -> Array:
    dtype = max(wide_dtype(param.dtype), change.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    total = (param.astype(dtype) + change.astype(dtype)).astype(param.dtype)
    # XLA is free to leave out a cast there and back, and with it what the narrow dtype rounds away.
    return total if dtype == param.dtype else jax.lax.optimization_barrier(total)


def _check(leaves: Mapping[str, Array], part: Mapping[str, Array]) -> None:
    for path, change in part.items():
        if path not in leaves or jnp.shape(change) != jnp.shape(leaves[path]):
            held = f"of shape {jnp.shape(leaves[path])}" if path in leaves else "none of that path"
            raise ValueError(
                f"a change of {path!r} has shape {jnp.shape(change)}, the parameter is {held}; "
                "give a tree like params, or some of its leaves by path"
            )
