"""RMU, representation misdirection (Li et al., WMDP, arXiv 2403.03218).

    RMU            mean ‖h(x_f) - c u‖²
    RetainStates   mean ‖h(x_r) - h_ref(x_r)‖²

h is a hidden state (features on the last axis), u a fixed random direction, the means over the
positions that count and over the features. c = 2 is open-unlearning's [code], and so is the sum of
both terms with equal weights, which is the paper's objective:

    with_retain(RMU(hidden), RetainStates(hidden))

A `hidden` function picks the layer: RMU trains the parameters up to it alone (`trainable=`).

Differences.  open-unlearning takes the mean of each row's positions first and then that of the
rows, so that a short answer's tokens weigh more; ours takes one mean over all positions that count,
the same where the rows are equally long.  Its positions are those of the answers' tokens
themselves, ours those that `mask` counts, where each is predicted, one to the left of it.  A row of
which nothing counts makes its loss NaN; ours leaves it out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT_OR_ZERO, FINITE, check_numbers
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide_dtype
from jedit.objectives.hidden_states import Hidden, direction_like
from jedit.objectives.objective import Value, kept_rows, needed
from jedit.objectives.token_nll import masked_mean


@dataclasses.dataclass(frozen=True)
class RMU:
    """Misdirection of the forget rows' hidden states.

    Attributes:
        hidden: `(apply, params, inputs) -> states`, hashable, such as `jedit.tracing.Entering`.
        seed: of the direction u; 0 is arbitrary.
        steering: c.
    """

    hidden: Hidden
    seed: int = 0
    steering: float = 2.0

    def __post_init__(self) -> None:
        check_numbers(FINITE, steering=self.steering)
        check_numbers(COUNT_OR_ZERO, seed=self.seed)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the mean square distance from c u."""
        check_batch(forget, "forget")
        states = self.hidden(apply, params, forget.inputs)
        states = states.astype(wide_dtype(states.dtype))
        distance = _distance(states, self.steering * direction_like(states, self.seed), forget)
        return distance, {"forget_distance": distance}


@dataclasses.dataclass(frozen=True)
class RetainStates:
    """What RMU holds: the retain rows' hidden states, where they were before unlearning.

    Attributes:
        hidden: as of `RMU`.
    """

    hidden: Hidden

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: PyTree,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the mean square distance from the reference's states."""
        retain = kept_rows(retain)
        reference = needed(reference, self)
        states = self.hidden(apply, params, retain.inputs)
        states = states.astype(wide_dtype(states.dtype))
        before = self.hidden(apply, reference, retain.inputs).astype(states.dtype)
        distance = _distance(states, jax.lax.stop_gradient(before), retain)
        return distance, {"retain_distance": distance}


def _distance(
    states: Float[Array, "*lead width"], target: Float[Array, "*lead width"], batch: Batch
) -> Float[Array, ""]:
    counted = counted_outputs(batch, states.shape[:-1])
    return masked_mean(jnp.mean((states - target) ** 2, axis=-1), counted)
