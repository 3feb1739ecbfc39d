"""A small decoder-only transformer language model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from jedit.core.batch import Apply
from jedit.core.checks import COUNT, check_numbers
from jedit.models.decoding import Stepper
from jedit.models.experts import Experts, check_experts
from jedit.models.functional import to_pure, to_pure_method


def gpt(
    *,
    key: Key[Array, ""],
    vocab: int,
    width: int,
    num_layers: int,
    num_heads: int,
    max_len: int,
    mlp: Experts | Callable[[Array], Array] = jax.nn.gelu,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Apply, dict[str, Any]]:
    """Make a decoder-only language model as a pure function.

    Layer norms stand before the attention and before the perceptron of four times the width;
    positions are learned; the head is not tied to the embedding and has no bias. A token sees
    itself and what stands left of it, so right padding changes nothing to its left. Parameters are
    "embed/embedding", "positions", "blocks/<i>/attn_norm/scale",
    "blocks/<i>/attn/{query,key,value,out}/kernel", "blocks/<i>/mlp/{up,down}/kernel", "norm/scale",
    "head/kernel", and the biases; every kernel is `(d_in, d_out)`.

    With experts, "blocks/<i>/mlp/{up,down}" are `(experts, d_in, d_out)`, without biases, beside
    "blocks/<i>/mlp/router/kernel". Their sites have a layer for each expert, which sees the tokens
    that were sent to it: curvature is by expert. An expert that a share p of the tokens is sent to
    has moments p times as large as among its own, on both sides, so that its K-FAC block, their
    product, is p times too small; EK-FAC's eigenvalues are right. No loss balances the router.

    Args:
        key: for the initial parameters.
        vocab: number of tokens, and of logits.
        width: width of the residual stream.
        num_layers: number of blocks.
        num_heads: number of attention heads; divides the width.
        max_len: number of learned positions, the longest sequence that `apply` takes.
        mlp: the function between a perceptron's two kernels, `NMDA(...)` for instance, or
            `Experts(...)`, the size of a mixture in the place of each perceptron.
        dtype: dtype of the parameters; the computation follows the parameters given to `apply`.

    Returns:
        `(apply, params)`, with `apply(params, tokens (batch, seq)) -> logits (batch, seq, vocab)`.
        Instead of the tokens it takes `PackedTokens`, whose sequences may be longer than `max_len`;
        their rows may not, else the sequence's logits are NaN.

    Raises:
        ValueError: the heads do not divide the width, or a mixture that cannot be.
    """
    sizes = {"vocab": vocab, "width": width, "num_heads": num_heads, "max_len": max_len}
    check_numbers(COUNT, **sizes, num_layers=num_layers)
    if width % num_heads:
        raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}.")
    if isinstance(mlp, Experts):
        check_experts(mlp)
    from flax import nnx  # late: it takes a third of a second

    from jedit.models._networks import Gpt

    rngs = nnx.Rngs(key)
    return to_pure(Gpt(vocab, width, num_layers, num_heads, max_len, mlp, dtype, rngs))


def gpt_stepper(
    *,
    num_layers: int,
    num_heads: int,
    mlp: Experts | Callable[[Array], Array] = jax.nn.gelu,
) -> Stepper:
    """Make the one-position step of a `gpt` model, with a cache of keys and values.

    It is for `cached_decode`, with the parameters of `gpt`; the arguments are what the parameters
    do not tell of the model, as `gpt` was given them.
    """
    check_numbers(COUNT, num_layers=num_layers, num_heads=num_heads)
    if isinstance(mlp, Experts):
        check_experts(mlp)
    from flax import nnx

    from jedit.models._networks import Gpt, check_length

    def init(params: PyTree, batch: int, num_positions: int) -> tuple[tuple[Array, Array], ...]:
        (max_len, width), dtype = params["positions"].shape, params["positions"].dtype
        check_length(num_positions, max_len)
        zeros = jnp.zeros((batch, num_heads, num_positions, width // num_heads), dtype)
        return ((zeros, zeros),) * num_layers

    def step(params: PyTree, tokens: Array, position: Array, caches: Sequence[tuple[Array, Array]]):
        vocab, width = params["embed"]["embedding"].shape
        max_len, dtype = len(params["positions"]), params["positions"].dtype
        # Made without arrays, at trace time: only the module's structure is needed, which the
        # shapes tell.
        sizes = (vocab, width, num_layers, num_heads, max_len, mlp, dtype)
        module = nnx.eval_shape(lambda: Gpt(*sizes, nnx.Rngs(0)))
        return to_pure_method(module, "step")(params, tokens, position, caches)

    return Stepper(init, step)
