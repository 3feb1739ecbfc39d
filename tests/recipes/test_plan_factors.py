"""The bytes in which a plan says that a factor is decomposed."""

import jax
import jax.numpy as jnp
import pytest

from jedit.curvature.types import Factor
from jedit.recipes.plan.factors import workspace


@pytest.mark.parametrize(
    ("k", "whole"), [(8, False), (20, False), (21, True), (40, True), (99, True)]
)
def test_leading_eigenvectors_may_take_a_whole_decomposition(k, whole):
    """From a quarter of all on they are found among all, in as much room as all are."""
    d, layers = 100, 3
    leading = Factor(
        None,
        jax.ShapeDtypeStruct((layers, d, k), jnp.float32),
        jax.ShapeDtypeStruct((layers, 1 + k), jnp.float32),
    )
    square = jax.ShapeDtypeStruct((layers, d, d), jnp.float32)
    every = Factor(square, square, jax.ShapeDtypeStruct((layers, d), jnp.float32))
    assert workspace([every]) == 4 * d * d * 4
    assert workspace([leading]) == (workspace([every]) if whole else 3 * d * (2 * k + 8) * 4)
    assert workspace([leading, every]) == workspace([every])
    assert workspace([Factor(square, None, None, "cholesky")]) == workspace([]) == 0
