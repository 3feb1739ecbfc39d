"""Representation deviation: turn the forget tokens' hidden states away (KUDA, arXiv 2602.19275).

    loss = mean cos(h(x_f), t),    t = h_ref(x_f) + τ ‖h_ref(x_f)‖ u

    h      hidden state, features on the last axis            `hidden`
    h_ref  the same of the frozen params before unlearning    `reference`
    u      fixed unit direction, τ how far t leans to it      `seed`, `tilt`

The mean is over the forget positions that count. KUDA adds a retain term on the outputs:
`with_retain(RepresentationDeviation(hidden))`. [steps: paper; exact symbols: derived]

Differences. At the reference params the cosine itself has its maximum, hence no gradient, and plain
descent would wait for the retain term or for rounding to move it: t leans a little towards u, as
RMU's target does altogether, which gives a first step and no more [derived]. With τ = 0 t is h_ref.
τ = 0.1 is arbitrary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT_OR_ZERO, FINITE, check_numbers
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.objectives.hidden_states import Hidden, direction_like
from jedit.objectives.objective import Value, needed
from jedit.objectives.token_nll import masked_mean


@dataclasses.dataclass(frozen=True)
class RepresentationDeviation:
    """The cosine of hidden states with what they were, to be lowered.

    Attributes:
        hidden: `(apply, params, inputs) -> states`, hashable, such as `jedit.tracing.Entering`.
        seed: of the direction u; 0 is arbitrary.
        tilt: τ; 0.1 is arbitrary.
    """

    hidden: Hidden
    seed: int = 0
    tilt: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(FINITE, tilt=self.tilt)
        check_numbers(COUNT_OR_ZERO, seed=self.seed)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the mean cosine, which costs one more forward pass, of the reference."""
        reference = needed(reference, self)
        check_batch(forget, "forget")
        target = wide(jax.lax.stop_gradient(self.hidden(apply, reference, forget.inputs)))
        norms = jnp.linalg.norm(target, axis=-1, keepdims=True)
        target = target + self.tilt * norms * direction_like(target, self.seed)
        cosine = _cosine(wide(self.hidden(apply, params, forget.inputs)), target)
        mean = masked_mean(cosine, counted_outputs(forget, cosine.shape))
        return mean, {"forget_cosine": mean}


def _cosine(x: Float[Array, "*lead d"], y: Float[Array, "*lead d"]) -> Float[Array, "*lead"]:
    """Cosine along the last axis; 0, with no gradient, where either vanishes."""
    x, y = _about_one(x), _about_one(y)
    squares = jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1)
    is_there = squares > 0
    norms = jnp.sqrt(jnp.where(is_there, squares, 1))
    return jnp.where(is_there, jnp.sum(x * y, axis=-1) / norms, 0)


def _about_one(x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
    """The rows with entries of one at most, which no cosine sees: squares of small ones vanish."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    return x / jnp.where(largest > 0, largest, 1)
