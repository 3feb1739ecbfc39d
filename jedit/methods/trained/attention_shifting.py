"""Attention-Shifting: forget by attending elsewhere (Tan et al. 2025, arXiv 2510.17210).

    I(t_j) = H(y | x without t_j) - H(y | x)                        `token_importance`
    m_j    = 1 for the tokens of largest I, of I > 0                `share`
    L      = α mean KL(A ‖ suppressed A_ref) on forget rows
             + (1 - α) mean KL(A ‖ reinforced A_ref) on retain rows

    H   entropy of the model's next token, mean over the outputs that count
    A   attention weights; suppressed and reinforced    `objectives.SuppressAttention`, ...
    α   `forget_weight`;   λ, μ   `suppression`, `reinforcement`

A token whose absence makes the answer uncertain carries a fact; function words do not. Attention is
turned away from the first on forget rows, and towards them on retain rows. The model's attention is
found in its traced program (`tracing.AttentionMaps`), whatever library wrote it.

Differences. The formulas are the paper's [paper, by the notes]; α, λ, μ and the threshold are not
known to us: α = 0.5, λ = μ = 0.9 and a quarter of a row's tokens are arbitrary. "Without t_j" is
ours: no other position attends to it in any layer, the remaining weights divided by their sum, so
that positions stay where they were and no text is made that the model never saw. Which tokens t_j
may be is ours, too: those of the question, before the position where the first counted output is
read off (that one sees itself); in a row without a question, all. The first token never is: models
rest unused attention on it, and to hide it says nothing about facts. The paper trains
adapters in the attention; ours trains what `trainable` names, by default everything (with the
adapters of `models.with_lora`, those alone).
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, NOT_NEGATIVE, POSITIVE_SHARE, SHARE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import by_example, check_contents, counted_outputs
from jedit.core.precision import wide
from jedit.objectives.attention_shift import (
    BELOW_ONE,
    AttentionReader,
    Marked,
    RetainAttention,
    SuppressAttention,
)
from jedit.objectives.held import with_retain
from jedit.tracing.attention_maps import AttentionMaps
from jedit.training.method import TrainingMethod


def attention_shifting(
    optimizer: optax.GradientTransformation,
    *,
    forget_weight: float = 0.5,
    suppression: float = 0.9,
    reinforcement: float = 0.9,
    share: float = 0.25,
    maps: AttentionReader = AttentionMaps(),  # noqa: B008 - frozen and hashable
    chunk: int = 32,
) -> TrainingMethod:
    """Make Attention-Shifting around any optimizer.

        method = attention_shifting(optax.adam(1e-4))
        params, history = jedit.unlearn(method, apply, params, forget, retain, steps=100, key=key)

    Args:
        optimizer: learning rate included.
        forget_weight: α, the weight of the forget rows, 1 - α that of the retain rows; 0.5 is
            arbitrary.
        suppression: λ; 0.9 is arbitrary.
        reinforcement: μ; 0.9 is arbitrary.
        share: which part of a row's tokens is important, at most; 0.25 is arbitrary.
        maps: how attention is read, and a token hidden.
        chunk: rows whose tokens are judged at once, in `token_importance`; 32 is arbitrary.

    Returns:
        A method for `jedit.unlearn`. Before the first step it runs every row of both sets, drawn
        later or not, once for each token of the longest question; a step costs two gradients and
        two forward passes, and holds some five arrays of all attention weights of its rows in
        float32: layers x heads x rows x length².

    Raises:
        ValueError: a number is out of its range. When it runs: the model has no attention, or forms
            no weights.
    """
    check_numbers(SHARE, forget_weight=forget_weight)
    check_numbers(POSITIVE_SHARE, share=share)
    check_numbers(BELOW_ONE, suppression=suppression)
    check_numbers(NOT_NEGATIVE, reinforcement=reinforcement)
    objective = with_retain(
        SuppressAttention(maps, suppression),
        RetainAttention(maps, reinforcement),
        weight=1 - forget_weight,
        forget_weight=forget_weight,
    )
    check_numbers(COUNT, chunk=chunk)
    prepare = functools.partial(_marked_sets, maps, share, chunk)
    return TrainingMethod(objective, optimizer, prepare=prepare)


def _marked_sets(
    maps: AttentionReader,
    share: float,
    chunk: int,
    apply: Apply,
    params: PyTree,
    forget: Batch,
    retain: Batch,
) -> tuple[Marked, Marked]:
    check_batch(forget, "forget")
    check_batch(retain, "retain")
    forget_marks, retain_marks = (
        important_tokens(
            token_importance(apply, params, rows, maps=maps, chunk=chunk), rows, share=share
        )
        for rows in (forget, retain)
    )
    return (forget, forget_marks), (retain, retain_marks)


@on_auto_axes
def token_importance(
    apply: Apply,
    params: PyTree,
    rows: Batch,
    *,
    maps: AttentionReader = AttentionMaps(),  # noqa: B008 - frozen and hashable
    chunk: int = 32,
) -> Float[Array, "batch seq"]:
    """Return how much more uncertain the answer is where a token is hidden, nats per output.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the parameters.
        rows: the rows; the mean is over a row's outputs that count.
        maps: how attention is read, and a token hidden.
        chunk: rows that are computed at once; 32 is arbitrary. Their logits are held whole.

    Returns:
        I, zero where a token is no candidate (the first, what answers, padding), where a row counts
        nothing, and where it is no more than rounding of the outputs' dtype. It costs a forward
        pass of every row for each position that is a candidate in one of them.

    Raises:
        ValueError: the model has no attention, or forms no weights; there are no rows, or they are
            packed.
    """
    check_numbers(COUNT, chunk=chunk)
    check_batch(rows, "rows")
    check_contents(rows, "rows")
    lead = jax.eval_shape(apply, params, rows.inputs).shape[:-1]
    keys = jax.eval_shape(functools.partial(maps, apply), params, rows.inputs).shape[-1]
    candidates = _candidates(rows, lead, keys)
    # Every chunk looks at the same positions, so that one program serves all.
    positions = jnp.flatnonzero(jnp.any(candidates, axis=0))
    parts = [
        _importance(
            apply, maps, params, jax.tree.map(lambda x, i=i: x[i : i + chunk], rows), positions
        )
        for i in range(0, len(candidates), chunk)
    ]
    found = jnp.concatenate(parts)
    found = jnp.zeros(candidates.shape, found.dtype).at[:, positions].set(found)
    return jnp.where(candidates, found, 0)


def _candidates(rows: Batch, lead: tuple[int, ...], keys: int) -> Bool[Array, "batch keys"]:
    """Return which tokens of each row may be hidden."""
    counted = by_example(rows, counted_outputs(rows, lead))
    shape = len(counted), keys
    if counted.shape != shape:  # not a language model: what it attends to are no positions
        return jnp.ones(shape, bool)
    valid = counted_outputs(Batch(rows.inputs, valid=rows.valid), lead).reshape(shape)
    place = jnp.broadcast_to(jnp.arange(keys)[None], shape)
    first = jnp.argmax(counted, axis=1)[:, None]
    return valid & (place > 0) & ((place < first) | (first == 0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _importance(
    apply: Apply, maps: AttentionReader, params: PyTree, rows: Batch, positions: Int[Array, " some"]
) -> Float[Array, "batch some"]:
    def entropies(position: Array) -> tuple[Array, Array]:
        logits = maps.without(apply, params, rows.inputs, position)
        log_p = jax.nn.log_softmax(wide(logits), axis=-1)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        counted = by_example(rows, counted_outputs(rows, entropy.shape))
        total = jnp.sum(jnp.where(counted, by_example(rows, entropy), 0), axis=-1)
        number = jnp.sum(counted, axis=-1)
        least = jnp.asarray(jnp.finfo(logits.dtype).eps, total.dtype)
        return total / jnp.maximum(number, 1).astype(total.dtype), least

    # The whole row goes through the same program, hiding nothing: what does not see a token is
    # then the same to the bit with and without it.
    none = jnp.full(1, -1, positions.dtype)
    found, least = jax.lax.map(entropies, jnp.concatenate([none, positions]))
    whole, added = found[0], found[1:] - found[:1]
    is_above = jnp.abs(added) > least[0] * (1 + whole)[None]
    return jnp.where(is_above, added, 0).T


def important_tokens(
    importance: Float[Array, "batch seq"], rows: Batch, *, share: float = 0.25
) -> Bool[Array, "batch seq"]:
    """Mark the tokens of each row that are most important, of importance above zero.

    Args:
        importance: I, as `token_importance` returns it.
        rows: the rows, whose padding is not counted among their tokens.
        share: which part of the tokens that may be hidden, of a row with a question those of it,
            at most, rounded up; 0.25 is arbitrary.
    """
    check_numbers(POSITIVE_SHARE, share=share)
    seq = importance.shape[-1]
    length = jnp.full(len(importance), seq)
    if rows.mask is not None and rows.mask.shape == importance.shape:
        length = jnp.sum(_candidates(rows, importance.shape, seq), axis=-1)
    elif rows.valid is not None and rows.valid.shape == importance.shape:
        length = jnp.sum(rows.valid.astype(bool), axis=-1)
    # How many of a row's tokens stand before each: the first of equal ones is the first in line.
    order = jnp.argsort(-importance, axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1, stable=True)
    allowed = jnp.ceil(share * length.astype(importance.dtype) - 1e-6 * math.sqrt(seq))
    return (place < allowed[:, None].astype(place.dtype)) & (importance > 0)
