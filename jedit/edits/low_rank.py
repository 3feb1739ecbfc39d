"""Blocks of low rank: the change of one parameter as two thin matrices.

    Δ = L R,   L (layers, d_in, rank),   R (layers, rank, d_out)

which is what a request of few positions changes, since its gradient is a sum of as many outer
products. Whatever may stand in `Edit.blocks` has `shape`, `dtype` and these functions.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jedit.core.display import short_repr
from jedit.core.precision import HIGHEST
from jedit.curvature.types import pytree
from jedit.tracing.sites import Weight


@pytree("weight")
@dataclass(frozen=True)
class LowRank:
    """A change of one parameter, of low rank; further axes may lead both matrices.

    Attributes:
        left: L (..., layers, d_in, rank).
        right: R (..., layers, rank, d_out).
        weight: how a parameter is such a matrix; it has no bias.
    """

    left: Array
    right: Array
    weight: Weight

    __repr__ = short_repr

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the parameter's change, behind the axes that lead."""
        return (*self.left.shape[:-3], *self.weight.shape)

    @property
    def dtype(self) -> Any:
        """Return the dtype of both matrices."""
        return self.left.dtype

    @property
    def rank(self) -> int:
        """Return the number of columns of the left matrix."""
        return self.left.shape[-1]

    def astype(self, dtype: DTypeLike) -> "LowRank":
        """Return the block in another dtype."""
        return LowRank(self.left.astype(dtype), self.right.astype(dtype), self.weight)

    def scaled(self, factor: Array) -> "LowRank":
        """Return the block times a number."""
        return LowRank(self.left * factor, self.right, self.weight)

    def plus(self, other: "LowRank") -> "LowRank":
        """Return the sum of two blocks, of the sum of their ranks; nothing is multiplied out."""
        # [L₁ L₂] [R₁; R₂] = L₁R₁ + L₂R₂.
        left = jnp.concatenate([self.left, other.left], axis=-1)
        return LowRank(left, jnp.concatenate([self.right, other.right], axis=-2), self.weight)

    def dense(self) -> Array:
        """Return the change as an array like the parameter."""
        return as_parameter(self.weight, jnp.matmul(self.left, self.right, precision=HIGHEST))


Delta = Array | LowRank


def as_parameter(weight: Weight, matrix: Array) -> Array:
    """Lay out (..., layers, d_in, d_out) as the parameter, behind the axes that lead."""
    lead = matrix.shape[:-3]
    flat = matrix.reshape(-1, *matrix.shape[-3:])
    leaves = jax.vmap(lambda one: weight.scatter(one)[weight.path])(flat)
    return leaves.reshape(*lead, *weight.shape)


def dense(block: Delta) -> Array:
    """Return a block as an array."""
    return block.dense() if isinstance(block, LowRank) else block


def scaled(block: Delta, factor: Array) -> Delta:
    """Return a block times a number, in the number's dtype."""
    if isinstance(block, LowRank):
        return block.scaled(factor)
    return block * factor


def added(one: Delta, other: Delta) -> Delta:
    """Return the sum of two blocks of one parameter; thin if both are, and laid out alike."""
    if isinstance(one, LowRank) and isinstance(other, LowRank) and one.weight == other.weight:
        return one.plus(other)
    return dense(one) + dense(other)
