"""A Flax NNX module as a pure function and a nested dict of arrays.

The rest of the library knows models only as `apply(params, inputs) -> outputs`. The parameters are
plain nested dicts with string keys (a list of modules becomes the keys "0", "1", ...), so that a
path such as "blocks/0/attn/query/kernel" is the same before and after a checkpoint, and any pytree
tool can read it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply
from jedit.core.precision import wide_dtype


def to_pure(
    module: Any, call: Callable[[Any, Any], Array] | None = None
) -> tuple[Apply, dict[str, Any]]:
    """Split a module that carries nothing but parameters into `(apply, params)`.

    `apply` holds the module's static structure alone; it draws no random numbers and changes no
    state.

    Args:
        module: an `nnx.Module`.
        call: `(module, inputs) -> outputs`, for modules whose call takes more than one argument or
            returns more than one array. None: `module(inputs)`.

    Returns:
        `apply(params, inputs) -> outputs`, and the parameters as nested dicts of arrays.

    Raises:
        ValueError: the module carries state besides parameters (batch statistics, random streams).
    """
    from flax import nnx  # late: it takes a third of a second

    graphdef, state, rest = nnx.split(module, nnx.Param, ...)
    if leftover := ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]:
        raise ValueError(
            f"{type(module).__name__} carries state that is no parameter: {', '.join(leftover)}. A "
            "pure function of the parameters needs a module without dropout, batch statistics or "
            "caches."
        )

    def apply(params: PyTree, inputs: Any) -> Array:
        merged = nnx.merge(graphdef, _with_list_indices(params))
        return merged(inputs) if call is None else call(merged, inputs)

    return apply, _with_string_keys(nnx.to_pure_dict(state))


def mixed_precision(apply: Apply, dtype: DTypeLike) -> Apply:
    """Make a function that computes in `dtype`, whatever the parameters are stored in.

    They are cast inside, so that small steps add up in the stored ones (in float32: the master
    weights of a training in bfloat16), and gradients and edits are of those. Outputs are float32 or
    wider.

    Args:
        apply: `apply(params, inputs) -> outputs`, whose computation follows the parameters.
        dtype: dtype of the computation.

    Returns:
        `apply(params, inputs)`: bit by bit that of `cast_params(params, dtype)`.
    """

    def run(params: PyTree, inputs: Any) -> Array:
        outputs = apply(cast_params(params, dtype), inputs)
        return outputs.astype(wide_dtype(outputs.dtype))

    return run


def cast_params(params: PyTree, dtype: DTypeLike) -> PyTree:
    """Cast the parameters to another dtype; integers stay as they are."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, params)


def to_pure_method(module: Any, name: str) -> Callable:
    """Take one method of a module as `call(params, *args)`, for the params of `to_pure`.

    Args:
        module: the module; one made under `nnx.eval_shape` will do: its arrays are not looked at.
        name: name of the method.

    Returns:
        The function `call(params, *args)`.
    """
    from flax import nnx

    graphdef, _, _ = nnx.split(module, nnx.Param, ...)

    def call(params: PyTree, *args: Any) -> Any:
        return getattr(nnx.merge(graphdef, _with_list_indices(params)), name)(*args)

    return call


def _with_string_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(name): _with_string_keys(value) for name, value in tree.items()}
    return tree


def _with_list_indices(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            int(name) if name.isdecimal() else name: _with_list_indices(value)
            for name, value in tree.items()
        }
    return tree
