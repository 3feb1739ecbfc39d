"""A top-k sparse autoencoder of hidden states (Gao et al. 2024, arXiv 2406.04093).

    z = topk(relu((h - b_dec) W_enc + b_enc))        h_hat = z W_dec + b_dec
    loss = mean ‖h - h_hat‖² / V  +  ρ / m Σ over dead latents of min over h of (least - before)₊

    m       number of latents                                `latents`
    k       latents that may be on at once                   `active`
    W_dec   rows of norm one, of which h is a sparse sum     `decoder`
    V       mean ‖h - mean h‖², so that 1 explains nothing
    before  a latent before the ReLU; least is the smallest of those that are on
    ρ       weight of the revival                            `revival`

Differences. The paper revives dead latents by letting them reconstruct what the others have left
[paper]; ours, which did more for few states, pulls each one up at the state at which it is nearest
to being on. There a latent is dead that has been off for ten million tokens; here one that is off
throughout the step's batch, which needs no count between steps. Gradients of the rows of
W_dec are not projected: the rows are divided by their norm in the forward pass instead. b_dec
begins at the mean of the states, there at their geometric median. The states are divided by the
root of V / d, so that one learning rate serves all.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from jedit.core.checks import COUNT, NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.core.display import short_repr
from jedit.core.precision import HIGHEST, wide
from jedit.training.loop import fit

Weights = dict[str, Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["encoder", "encoder_bias", "decoder", "decoder_bias", "scale"],
    meta_fields=["active"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A sparse autoencoder.

    Attributes:
        encoder: W_enc.
        encoder_bias: b_enc.
        decoder: W_dec, rows of norm one.
        decoder_bias: b_dec, in units of the scale.
        scale: what states are divided by.
        active: k, how many latents are on at once, at most.
    """

    encoder: Float[Array, "d m"]
    encoder_bias: Float[Array, " m"]
    decoder: Float[Array, "m d"]
    decoder_bias: Float[Array, " d"]
    scale: Float[Array, ""]
    active: int

    def encode(self, states: Float[Array, "*lead d"]) -> Float[Array, "*lead m"]:
        """Return z, of which at most k entries are not zero."""
        return top(self._before(states), self.active)

    def decode(self, latents: Float[Array, "*lead m"]) -> Float[Array, "*lead d"]:
        """Return h_hat."""
        bias = self.decoder_bias.reshape((1,) * (latents.ndim - 1) + (-1,))
        return (_product(latents, self.decoder) + bias) * self.scale

    def _before(self, states: Array) -> Array:
        ones = (1,) * (states.ndim - 1)
        centred = states.astype(self.encoder.dtype) / self.scale
        centred = centred - self.decoder_bias.reshape(*ones, -1)
        raw = _product(centred, self.encoder) + self.encoder_bias.reshape(*ones, -1)
        return jax.nn.relu(raw)


class AutoencoderInfo(NamedTuple):
    """How good a sparse autoencoder is on the states that it was trained on.

    Attributes:
        explained_variance: 1 - Σ‖h - h_hat‖² / Σ‖h - mean h‖².
        active: mean number of latents that are on (L0).
        dead: share of the latents that no state switches on.
        history: per step "loss" and the terms, as `fit` returns it.
    """

    explained_variance: float
    active: float
    dead: float
    history: dict[str, Array]

    __repr__ = short_repr


def top(values: Float[Array, "*lead m"], number: int) -> Float[Array, "*lead m"]:
    """Return the largest values of each row, zero in the place of the others."""
    if number >= values.shape[-1]:
        return values
    # Strictly no more than so many, also of equal values.
    largest, where = jax.lax.top_k(values, number)
    return jnp.put_along_axis(jnp.zeros_like(values), where, largest, axis=-1, inplace=False)


def _product(rows: Array, matrix: Array) -> Array:
    return jnp.matmul(rows, matrix, precision=HIGHEST)


def fit_autoencoder(
    states: Float[Array, "n d"],
    *,
    latents: int,
    active: int,
    key: Key[Array, ""],
    epochs: float | int = 30,
    learning_rate: float = 3e-3,
    batch_size: int = 256,
    revival: float = 0.1,
) -> tuple[SparseAutoencoder, AutoencoderInfo]:
    """Train a top-k sparse autoencoder by Adam.

    Args:
        states: hidden states, a row each.
        latents: m, their number; several times d, as a rule.
        active: k, how many are on at once.
        key: of the initial directions and of the order of the states.
        epochs: how often each state is seen; 30 is arbitrary.
        learning_rate: Adam's; 3e-3 is arbitrary.
        batch_size: states in a step; 256 is arbitrary.
        revival: ρ, weight of the dead latents' loss; 0.1 is arbitrary.

    Returns:
        The autoencoder, in float32 or wider, and how good it is. A step costs about 12 d m flops a
        state.

    Raises:
        ValueError: a number is out of its range, more latents are to be on than there are, the
            states are all alike, or hold no rows.
    """
    check_numbers(COUNT, latents=latents, active=active, batch_size=batch_size)
    check_numbers(POSITIVE, learning_rate=learning_rate, epochs=epochs)
    check_numbers(NOT_NEGATIVE, revival=revival)
    if active > latents:
        raise ValueError(f"active={active} latents cannot be on of latents={latents}")
    states = wide(jnp.asarray(states))
    if not len(states):
        raise ValueError("there are no states to train an autoencoder on")
    begin_key, order_key = jax.random.split(key)
    mean = jnp.mean(states, axis=0)
    variance = jnp.mean(jnp.sum((states - mean[None]) ** 2, axis=-1)) / states.shape[1]
    if not float(variance) > 0:
        raise ValueError("the states are all alike, or not finite: there is nothing to encode")
    scale = jnp.sqrt(variance)
    decoder = jax.random.normal(begin_key, (latents, states.shape[1]), states.dtype)
    decoder = _unit(decoder)
    weights = {
        "encoder": decoder.T,
        "encoder_bias": jnp.zeros(latents, states.dtype),
        "decoder": decoder,
        "decoder_bias": mean / scale,
    }
    loss = _Loss(active, revival)
    found, history = fit(
        loss,
        optax.adam(learning_rate),
        weights,
        states / scale,
        epochs=epochs,
        key=order_key,
        batch_size=batch_size,
    )
    made = _made(found, active, scale)
    return made, _judged(made, states, history)


def _unit(rows: Array) -> Array:
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / jnp.maximum(norm, jnp.finfo(rows.dtype).tiny)


def _made(weights: Weights, active: int, scale: Array) -> SparseAutoencoder:
    return SparseAutoencoder(
        weights["encoder"],
        weights["encoder_bias"],
        _unit(weights["decoder"]),
        weights["decoder_bias"],
        scale,
        active,
    )


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of states that are divided by their scale, whose V is therefore d."""

    active: int
    revival: float

    def __call__(self, weights: Weights, states: Array) -> tuple[Array, dict[str, Array]]:
        made = _made(weights, self.active, jnp.ones((), states.dtype))
        before = made._before(states)
        z = top(before, self.active)
        error = states - made.decode(z)
        width = states.shape[-1]
        loss = jnp.mean(jnp.sum(error**2, axis=-1)) / width
        is_dead = ~jnp.any(z > 0, axis=0)
        # Before the ReLU: what it cuts off has no gradient, and could never be revived.
        raw = _product(states - weights["decoder_bias"][None], weights["encoder"])
        raw = raw + weights["encoder_bias"][None]
        least = jax.lax.stop_gradient(jax.lax.top_k(before, self.active)[0][:, -1:])
        lacking = jax.nn.relu(jnp.min(least - raw, axis=0))
        again = jnp.mean(jnp.where(is_dead, lacking, 0))
        aux = {"reconstruction": loss, "dead": jnp.mean(is_dead.astype(loss.dtype))}
        return loss + self.revival * again, aux


def _judged(made: SparseAutoencoder, states: Array, history: dict[str, Array]) -> AutoencoderInfo:
    z = made.encode(states)
    error = jnp.sum((states - made.decode(z)) ** 2)
    total = jnp.sum((states - jnp.mean(states, axis=0)[None]) ** 2)
    is_on = z > 0
    return AutoencoderInfo(
        float(1 - error / total),
        float(jnp.mean(jnp.sum(is_on, axis=-1).astype(error.dtype))),
        float(jnp.mean((~jnp.any(is_on, axis=0)).astype(error.dtype))),
        history,
    )
