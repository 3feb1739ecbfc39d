"""Attention-Shifting: turn attention off what carries the facts (Tan et al. 2025, 2510.17210).

    L   = α mean KL(A ‖ S(A_ref)) over forget  +  (1 - α) mean KL(A ‖ R(A_ref)) over retain rows
    S   s_ij ∝ a_ij (1 - λ m_j)        R   r_ij ∝ a_ij (1 + μ m_j),  each row of sum one

    A      attention weights: map (layer and head), query i, key j    `maps`
    A_ref  the same of the params before unlearning, held fixed       `reference`
    m_j    1 where token j is important, else 0                       `marks`, beside the rows
    λ, μ   strength of suppression and of reinforcement               `strength`

The mean is over maps and over the queries that count. α is what `with_retain` weighs the two by:
`methods.attention_shifting` does so, and marks the tokens.

Differences. The forms of L and S are the paper's [paper, by the notes]. R, "reinforced" there, is
ours: the same with the sign turned. λ = 0.9 and μ = 0.9 are arbitrary: at λ = 1 the target is zero
where A is not, and the KL infinite. Which queries are meant is not stated; ours are those where the
answer is predicted, as in every objective here. The paper trains adapters in the attention; here a
method's `trainable=` chooses the parameters.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, Range, check_numbers
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.objectives.objective import Value, needed
from jedit.objectives.token_nll import masked_mean

Maps = Callable[[Apply, PyTree, PyTree], Float[Array, "maps batch *lead keys"]]
"""`(apply, params, inputs) -> weights`, hashable; `jedit.tracing.AttentionMaps()` is one."""


@runtime_checkable
class AttentionReader(Protocol):
    """How a model's attention is read, and a token hidden: `jedit.tracing.AttentionMaps`."""

    def __call__(
        self, apply: Apply, params: PyTree, inputs: PyTree
    ) -> Float[Array, "maps batch *lead keys"]:
        """Return the weights."""
        ...

    def without(self, apply: Apply, params: PyTree, inputs: PyTree, position: Any) -> Array:
        """Return the outputs where no other position attends to this one; -1 hides none."""
        ...


Marked = tuple[Batch, Array]
"""Rows, and (batch, keys) which of their tokens are important."""

BELOW_ONE = Range(0, 0.999)


@dataclasses.dataclass(frozen=True)
class SuppressAttention:
    """Attention on the forget rows' important tokens, to be weakened.

    Attributes:
        maps: `(apply, params, inputs) -> weights`, hashable, `jedit.tracing.AttentionMaps()`.
        strength: λ, which part of the attention is taken away; 0.9 is arbitrary.
    """

    maps: Maps
    strength: float = 0.9

    def __post_init__(self) -> None:
        check_numbers(BELOW_ONE, strength=self.strength)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: PyTree,
        retain: PyTree = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the mean KL to the suppressed attention; forget is (rows, marks).

        It costs one more forward pass, of the reference.
        """
        models = params, needed(reference, self)
        distance = _shifted_kl(self.maps, apply, models, forget, -self.strength, "forget")
        return distance, {"forget_attention_kl": distance}


@dataclasses.dataclass(frozen=True)
class RetainAttention:
    """Attention on the retain rows' important tokens, to be strengthened.

    Attributes:
        maps: as `SuppressAttention` takes it.
        strength: μ, how much is added to it; 0.9 is arbitrary, 0 holds it where it was.
    """

    maps: Maps
    strength: float = 0.9

    def __post_init__(self) -> None:
        check_numbers(NOT_NEGATIVE, strength=self.strength)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: PyTree,
        retain: PyTree = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the mean KL to the reinforced attention; retain is (rows, marks)."""
        models = params, needed(reference, self)
        distance = _shifted_kl(self.maps, apply, models, retain, self.strength, "retain")
        return distance, {"retain_attention_kl": distance}


def shifted(
    weights: Float[Array, "*lead keys"], marks: Bool[Array, "*lead keys"], change: float
) -> Float[Array, "*lead keys"]:
    """Return weights times 1 + change where marked, divided by their new sum."""
    moved = weights * (1 + change * marks.astype(weights.dtype))
    total = jnp.sum(moved, axis=-1, keepdims=True)
    # A row that attends to nothing stays so.
    return moved / jnp.where(total > 0, total, 1)


def _shifted_kl(
    maps: Maps,
    apply: Apply,
    models: tuple[PyTree, PyTree],
    marked: PyTree,
    change: float,
    name: str,
) -> Float[Array, ""]:
    if not isinstance(marked, tuple) or isinstance(marked, Batch) or len(marked) != 2:
        raise TypeError(
            f"{name} must be (rows, marks), the rows and which of their tokens are important, as "
            f"`methods.attention_shifting` prepares them; got {type(marked).__name__}"
        )
    rows, marks = marked
    check_batch(rows, name)
    params, reference = models
    attention = wide(maps(apply, params, rows.inputs))
    before = wide(jax.lax.stop_gradient(maps(apply, reference, rows.inputs)))
    batch, keys = attention.shape[1], attention.shape[-1]
    if marks.shape != (batch, keys):
        raise ValueError(f"marks have shape {marks.shape}, expected one a token, {(batch, keys)}")
    marks = marks.astype(bool).reshape(1, batch, *(1,) * (attention.ndim - 3), keys)
    target = shifted(before, jnp.broadcast_to(marks, before.shape), change)
    # What the mask excludes is zero in both; so are weights whose logarithm has no digits.
    least = jnp.finfo(attention.dtype).tiny
    is_there = (attention > least) & (target > least)
    ratio = jnp.log(jnp.where(is_there, attention, 1)) - jnp.log(jnp.where(is_there, target, 1))
    divergence = jnp.sum(jnp.where(is_there, attention * ratio, 0), axis=-1)
    counted = counted_outputs(rows, divergence.shape[1:])
    return masked_mean(divergence, jnp.broadcast_to(counted, divergence.shape))
