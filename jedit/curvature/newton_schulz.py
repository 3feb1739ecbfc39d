"""The inverse of a positive definite matrix by products of matrices alone (Schulz 1933).

    X ← s X (2 - s M),   M ← s M (2 - s M),   s = 2 / (l + u)        coupled: M = A X throughout
    X ← X + X R,         R = 1 - A X                                 refined: R as it really is

A, M (d, d); l and u enclose M's eigenvalues. The damping put on A is the first l, its Frobenius
norm or largest row sum the first u. With s the enclosure is centred at one: as long as l is far
below u a step gains a factor of four on l, where the unscaled one gains two [derived, after the
scaled iterations for polar factors]. Once l is near one the steps are refined by the true
residual, which rounding in M does not see, until its root mean square is at most `tolerance`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

# The enclosure's upper end is widened by so much: an eigenvalue that rounding had put above it
# would turn negative in the next step, and diverge. Arbitrary; it costs some steps in a hundred.
MARGIN = 0.02
CLOSE = 0.9  # the l at which the residual, at most 1 - l, is left to refinement; arbitrary
MOST_STEPS = 60  # of the coupled iteration, which gains a factor of about four on l in each
MOST_REFINEMENTS = 8  # a residual of a tenth takes four to get to float64's last digit


class NewtonSchulzInfo(NamedTuple):
    """Measurements of an inversion.

    Attributes:
        residual: ‖1 - A X‖ over the Frobenius norm of one, √d, of every layer.
        steps: number of coupled steps and of refinements, each of two products; all layers go
            together.
    """

    residual: Array
    steps: Array


def tolerance(dtype: DTypeLike) -> float:
    """Return the residual that an inverse has to reach: the root of the dtype's rounding."""
    return float(jnp.finfo(dtype).eps) ** 0.5


def solve(
    A: Array, one: Array, floor: Array, product: Callable[[Array, Array], Array]
) -> tuple[Array, NewtonSchulzInfo]:
    """Return X ≈ A⁻¹, and how near it came.

    Args:
        A: symmetric positive definite matrices, (layers, ..., d): rows along all axes between.
        one: the identity, (1, ..., d).
        floor: a lower bound of each layer's eigenvalues, (layers,), above zero.
        product: the matrix product in that form.

    Returns:
        X, of which the caller must see that its residual suffices, and the measurements.
    """
    d, inner = A.shape[-1], tuple(range(1, A.ndim))

    def each(x):
        return x.reshape(-1, *(1,) * len(inner))

    def norm(x):
        scale = jnp.max(jnp.abs(x), axis=inner)
        safe = jnp.where(scale > 0, scale, 1)
        return safe * jnp.sqrt(jnp.sum((x / each(safe)) ** 2, axis=inner))

    rows = jnp.sum(jnp.abs(A), axis=-1)
    upper = jnp.minimum(norm(A), jnp.max(rows, axis=inner[:-1]))
    # A layer's own step: X = s is the first, whose enclosure is A's, brought to one.
    s = 2 / (floor + (1 + MARGIN) * upper)
    start = (each(s) * one, each(s) * A, s * floor, s * upper, jnp.zeros((), jnp.int32))

    def coupled(carried):
        X, M, low, high, count = carried
        s = 2 / (low + (1 + MARGIN) * high)
        Y = each(s) * (2 * one - each(s) * M)
        # m (2 - m) is at most one, and smallest at the end of the enclosure that is further off.
        radius = jnp.maximum(1 - s * low, s * high - 1)
        return product(X, Y), product(M, Y), 1 - radius**2, jnp.ones_like(high), count + 1

    def is_far(carried):
        _, _, low, high, count = carried
        return jnp.any(low < CLOSE * high) & (count < MOST_STEPS)

    X, _, _, _, steps = jax.lax.while_loop(is_far, coupled, start)

    def residual_of(X):
        R = one - product(A, X)
        return R, norm(R) / d**0.5

    def refined(carried):
        X, R, before, _, count = carried
        X = X + product(X, R)
        R, residual = residual_of(X)
        return X, R, residual, before, count + 1

    def is_loose(carried):
        _, _, residual, before, count = carried
        # A step squares the residual, until rounding makes as much of it again.
        can_gain = (residual > tolerance(A.dtype)) & (residual < before / 2)
        return jnp.any(can_gain) & (count < MOST_REFINEMENTS)

    R, residual = residual_of(X)
    first = (X, R, residual, jnp.full_like(residual, 2), jnp.zeros((), jnp.int32))
    X, _, residual, _, refinements = jax.lax.while_loop(is_loose, refined, first)
    return X, NewtonSchulzInfo(residual, steps + refinements)
