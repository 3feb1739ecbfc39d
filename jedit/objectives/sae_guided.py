"""SAE-guided unlearning: make a known entity look like an unknown one (2509.15631).

    L = mean ‖z - μ_u‖² / V  +  ν mean max(0, 1 - s),     s = (z - μ_k) · (μ_u - μ_k) / ‖μ_u - μ_k‖²

    z    latents of a sparse autoencoder, of the hidden state at the entity's tokens    `latents`
    μ_u  mean of z over tokens of unknown entities, of the params before unlearning
    μ_k  the same over known entities
    V    mean ‖z - μ_u‖² over known entities, before                                    `distance`
    s    how far z has come on the way from μ_k, where it is 0, to μ_u, where it is 1
    ν    weight of the push away from μ_k                                               `push`

To forget is here to be recognised as one recognises who was never heard of. A retain term goes with
it: `with_retain(SAEGuided(hidden, latents))`.

Differences. That z is pulled to the mean of unknown and pushed from that of known entities, at the
entity's tokens, with a retain term, is the paper's [paper, by the notes]; the exact loss is not
known to us. Codes are sparse: those of single entities lie much farther from their mean than one
mean from the other. So ours measures the pull by what it is before the first step, and the push
along the line between the means alone: a distance from μ_k is large from the start, and would push
nowhere. The push ends at μ_u, for without an end it would go on for ever. ν = 1 is arbitrary.
Latents that the top-k leaves out have no gradient, so that what is not active can only become so as
others fall.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.objectives.hidden_states import Hidden
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import masked_mean

Tokens = Literal["first", "counted"]


@dataclasses.dataclass(frozen=True, eq=False)
class LatentMeans:
    """Where known and unknown entities lie among a sparse autoencoder's latents.

    Equal to itself alone: arrays cannot be compared while a program is compiled. What uses another
    one is compiled anew, and its arrays are constants of that program: large ones make it large.

    Attributes:
        encode: the autoencoder's, `states (..., d) -> latents (..., m)`.
        unknown: μ_u, mean latents at tokens of unknown entities.
        known: μ_k, the same of known ones.
        distance: V, mean squared distance of known entities' latents from μ_u.
    """

    encode: Callable[[Float[Array, "*lead d"]], Float[Array, "*lead m"]]
    unknown: Float[Array, " m"]
    known: Float[Array, " m"]
    distance: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class SAEGuided:
    """The distance of a known entity's latents from those of unknown ones.

    Attributes:
        hidden: `(apply, params, inputs) -> states`, hashable, such as `jedit.tracing.Entering`.
        latents: the autoencoder and both means, as `methods.fit_latents` makes them.
        push: ν; 1 is arbitrary.
        tokens: where a row's entity is looked at: "first", the position where the first output that
            counts is read off, so that a question about it has been read; "counted", all outputs
            that count, for rows whose mask marks the entity's tokens.
    """

    hidden: Hidden
    latents: LatentMeans
    push: float = 1.0
    tokens: Tokens = "first"

    def __post_init__(self) -> None:
        check_numbers(NOT_NEGATIVE, push=self.push)
        if self.tokens not in ("first", "counted"):
            raise ValueError(f"tokens must be 'first' or 'counted', got {self.tokens!r}")

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss; the reference is in the means already."""
        check_batch(forget, "forget")
        states = self.hidden(apply, params, forget.inputs)
        states, counted = entity_states(states, forget, self.tokens)
        z = self.latents.encode(states)
        found = self.latents.unknown, self.latents.known, self.latents.distance
        unknown, known, distance = (x.astype(z.dtype) for x in found)
        least, lead = jnp.finfo(z.dtype).tiny, (1,) * (z.ndim - 1)
        pull = jnp.sum((z - unknown.reshape(*lead, -1)) ** 2, axis=-1)
        pull = pull / jnp.maximum(distance, least)
        way = (unknown - known) / jnp.maximum(jnp.sum((unknown - known) ** 2), least)
        way, known = (x.reshape(*lead, -1) for x in (way, known))
        near = jnp.maximum(1 - jnp.sum((z - known) * way, axis=-1), 0)
        pull, push = (masked_mean(x, counted) for x in (pull, near))
        return pull + self.push * push, {"unknown_distance": pull, "known_nearness": push}


def entity_states(
    states: Float[Array, "batch *lead d"], batch: Batch, tokens: Tokens
) -> tuple[Float[Array, "batch *some d"], Bool[Array, "batch *some"]]:
    """Return the states among which a row's entity is looked at, and which of them count.

    Those of the first outputs are picked, so that nothing is encoded that is not looked at.
    """
    counted = entity_tokens(batch, states.shape[:-1], tokens)
    if tokens == "first" and states.ndim == 3:
        first = jnp.argmax(counted, axis=1)
        states = jnp.take_along_axis(states, first[:, None, None], axis=1)[:, 0]
        counted = jnp.any(counted, axis=1)
    return wide(states), counted


def entity_tokens(batch: Batch, lead: tuple[int, ...], tokens: Tokens) -> Bool[Array, "*lead"]:
    """Return the outputs at which a row's entity is looked at."""
    counted = counted_outputs(batch, lead)
    if tokens == "counted" or len(lead) < 2:
        return counted
    return counted & (jnp.cumsum(counted, axis=-1) == 1)
