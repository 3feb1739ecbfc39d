"""Decoding with fixed shapes: by whole passes, or with a cache of keys and values."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, POSITIVE, check_numbers
from jedit.core.precision import wide
from jedit.core.row_blocks import in_row_blocks


def greedy_decode(
    apply: Apply,
    params: PyTree,
    prompt_tokens: Int[Array | np.ndarray, "..."],
    num_steps: int,
    *,
    prompt_lengths: Int[Array | np.ndarray, "..."] | None = None,
) -> Int[Array, "batch num_steps"]:
    """Continue every prompt by its most probable token, `num_steps` times.

    One compiled call; the whole sequence is evaluated again for each token, which costs `num_steps`
    forward passes over `seq + num_steps` positions and needs nothing but `apply`. Nothing stops at
    an end token: cut the result there. Ties go to the smallest token.

    Args:
        apply: `(params, tokens) -> logits`, causal, so that right padding changes nothing.
        params: the model's parameters.
        prompt_tokens: prompts, `(batch, seq)`, right padded to one length.
        num_steps: how many tokens to add.
        prompt_lengths: `(batch,)`, the tokens of each prompt that count; None: all.

    Returns:
        The added tokens alone.

    Raises:
        ValueError: no step is asked for, or the shapes do not fit.
    """
    prompt_tokens, prompt_lengths = _checked(prompt_tokens, num_steps, prompt_lengths)
    return _decode(apply, num_steps, params, prompt_tokens, prompt_lengths)


class Stepper(NamedTuple):
    """A causal model evaluated one position at a time, with a cache.

    Attributes:
        init: a function `(params, batch, num_positions) -> cache`.
        step: a function `(params, tokens (batch,), position, cache) -> (logits (batch, vocab),
            cache)`.
    """

    init: Callable[[PyTree, int, int], Any]
    step: Callable[[PyTree, Array, Array, Any], tuple[Array, Any]]


def cached_decode(
    stepper: Stepper,
    params: PyTree,
    prompt_tokens: Int[Array | np.ndarray, "..."],
    num_steps: int,
    *,
    prompt_lengths: Int[Array | np.ndarray, "..."] | None = None,
) -> Int[Array, "batch num_steps"]:
    """Continue every prompt as `greedy_decode` does, each position evaluated once.

    All rows stand at the same position: a row reads its prompt while there is one and its own
    tokens after. Costs `seq + num_steps` steps of one position, in one compiled call. Logits agree
    with those of whole passes to rounding, so two tokens as good as level may change places.

    Args:
        stepper: the model's stepper, such as `gpt_stepper` makes.
        params: the model's parameters.
        prompt_tokens: prompts, `(batch, seq)`, right padded to one length.
        num_steps: how many tokens to add.
        prompt_lengths: `(batch,)`, the tokens of each prompt that count; None: all.

    Returns:
        The added tokens alone.

    Raises:
        ValueError: no step is asked for, or the shapes do not fit.
    """
    prompt_tokens, prompt_lengths = _checked(prompt_tokens, num_steps, prompt_lengths)
    return _cached_decode(stepper, num_steps, params, prompt_tokens, prompt_lengths, None)


def sampled_decode(
    stepper: Stepper,
    params: PyTree,
    prompt_tokens: Int[Array | np.ndarray, "..."],
    num_steps: int,
    *,
    key: Key[Array, ""],
    temperature: float | Array = 1.0,
    prompt_lengths: Int[Array | np.ndarray, "..."] | None = None,
) -> Int[Array, "batch num_steps"]:
    """Continue every prompt by tokens drawn from softmax(logits / temperature).

    It costs what `cached_decode` does. A row's draws depend on the key, on the row's number and on
    the position, so further rows, or more steps, leave them as they are.

    Args:
        stepper: the model's stepper, such as `gpt_stepper` makes.
        params: the model's parameters.
        prompt_tokens: prompts, `(batch, seq)`, right padded to one length.
        num_steps: how many tokens to add.
        key: of all draws.
        temperature: what logits are divided by; 1.0 is the model's own distribution.
        prompt_lengths: `(batch,)`, the tokens of each prompt that count; None: all.

    Returns:
        The added tokens alone.

    Raises:
        ValueError: no step is asked for, the temperature is not positive, or the shapes do not fit.
    """
    check_numbers(POSITIVE, temperature=temperature)
    prompt_tokens, prompt_lengths = _checked(prompt_tokens, num_steps, prompt_lengths)
    draws = _Draws(key, jnp.asarray(temperature, jnp.float32))
    return _cached_decode(stepper, num_steps, params, prompt_tokens, prompt_lengths, draws)


class _Draws(NamedTuple):
    """What tokens are drawn by: a key of all rows, and what their logits are divided by."""

    key: Key[Array, ""]
    temperature: Array

    def __call__(self, logits: Float[Array, "batch vocab"], position: Array) -> Array:
        def draw(row: Array, logits: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(self.key, row), position)
            return jax.random.categorical(key, logits / self.temperature.astype(logits.dtype))

        return jax.vmap(draw)(jnp.arange(len(logits)), wide(logits))


def _checked(prompt_tokens: Any, num_steps: int, prompt_lengths: Any) -> tuple[Array, Array]:
    check_numbers(COUNT, num_steps=num_steps)
    prompt_tokens = jnp.asarray(prompt_tokens)
    if prompt_tokens.ndim != 2 or prompt_tokens.shape[1] == 0:
        raise ValueError(f"prompt_tokens must be (batch, seq), got {prompt_tokens.shape}.")
    batch, seq = prompt_tokens.shape
    if prompt_lengths is None:
        prompt_lengths = jnp.full((batch,), seq)
    prompt_lengths = jnp.asarray(prompt_lengths).astype(jnp.int32)
    if prompt_lengths.shape != (batch,):
        raise ValueError(f"prompt_lengths must be ({batch},), got {prompt_lengths.shape}.")
    return prompt_tokens, prompt_lengths


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cached_decode(
    stepper: Stepper,
    num_steps: int,
    params: PyTree,
    prompt_tokens: Int[Array, "batch seq"],
    prompt_lengths: Int[Array, " batch"],
    draws: _Draws | None,
) -> Int[Array, "batch num_steps"]:
    batch, seq = prompt_tokens.shape
    total = seq + num_steps - 1  # the last token that is added is never read
    padded = jnp.pad(prompt_tokens, ((0, 0), (0, num_steps - 1)))

    def step(carry: tuple[Array, Any], xs: tuple[Array, Array]):
        (added, cache), (given, position) = carry, xs
        # Rows of different lengths go in step: a short one generates while a long one still reads.
        read = jnp.where(position < prompt_lengths, given, added)
        logits, cache = stepper.step(params, read, position, cache)
        chosen = jnp.argmax(logits, axis=-1) if draws is None else draws(logits, position)
        added = chosen.astype(read.dtype)
        return (added, cache), added

    positions = jnp.arange(total, dtype=prompt_lengths.dtype)
    first = (prompt_tokens[:, 0], stepper.init(params, batch, total))
    _, added = jax.lax.scan(step, first, (padded.T, positions))
    places = prompt_lengths[:, None] - 1 + jnp.arange(num_steps, dtype=prompt_lengths.dtype)[None]
    return jnp.take_along_axis(added.T, places, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    apply: Apply,
    num_steps: int,
    params: PyTree,
    prompt_tokens: Int[Array, "batch seq"],
    prompt_lengths: Int[Array, " batch"],
) -> Int[Array, "batch num_steps"]:
    rows = jnp.arange(prompt_tokens.shape[0])

    def likeliest(outputs: tuple[Array, ...], batch: Batch) -> Array:
        last = jnp.asarray(batch.targets)
        here = jnp.take_along_axis(outputs[0], last[:, None, None], axis=1)[:, 0]
        return jnp.argmax(here, axis=-1).astype(batch.inputs.dtype)

    def step(tokens: Array, i: Array) -> tuple[Array, Array]:
        last = prompt_lengths - 1 + i
        added = in_row_blocks(likeliest, apply, (params,), Batch(tokens, last))
        return tokens.at[rows, last + 1].set(added), added

    tokens = jnp.pad(prompt_tokens, ((0, 0), (0, num_steps)))
    _, added = jax.lax.scan(step, tokens, jnp.arange(num_steps, dtype=prompt_lengths.dtype))
    return added.T
