"""A multilayer perceptron: dense layers with an activation between them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jedit.core.batch import Apply
from jedit.core.checks import COUNT, check_numbers
from jedit.models.functional import to_pure


def mlp(
    *,
    key: Key[Array, ""],
    sizes: Sequence[int],
    activation: Callable[[Array], Array] = jax.nn.relu,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Apply, dict[str, Any]]:
    """Make a multilayer perceptron as a pure function.

    Inputs are flattened after their first axis, so images may be given as they are. Parameters are
    "layers/<i>/kernel" of shape `(sizes[i], sizes[i + 1])` and "layers/<i>/bias".

    Args:
        key: for the initial parameters (LeCun normal kernels, zero biases).
        sizes: the input width, the hidden widths, the number of outputs.
        activation: the function between two layers; the identity gives a deep linear network.
        dtype: dtype of the parameters; the computation follows the parameters given to `apply`.

    Returns:
        `(apply, params)`, with `apply(params, inputs) -> logits`.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(
            f"sizes must name at least an input and an output width, got {tuple(sizes)}."
        )
    check_numbers(COUNT, sizes=tuple(sizes))
    from flax import nnx  # late: it takes a third of a second

    from jedit.models._networks import Mlp

    return to_pure(Mlp(sizes, activation, dtype, nnx.Rngs(key)))
