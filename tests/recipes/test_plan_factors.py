"""The bytes in which a plan says that a factor is decomposed."""

import jax
import jax.numpy as jnp
import pytest

from jedit.curvature.limits import is_decomposed_whole
from jedit.curvature.types import Factor
from jedit.recipes.plan.factors import dropped, flops_of_one, workspace


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


@pytest.mark.parametrize("k", [20, 40])
def test_a_sketch_is_decomposed_in_its_own_columns(k):
    """Also where so many iterated eigenvectors would be found among all."""
    d, layers, m = 100, 3, 2 * k + 8
    leading = Factor(
        None,
        jax.ShapeDtypeStruct((layers, d, k), jnp.float32),
        jax.ShapeDtypeStruct((layers, 1 + k), jnp.float32),
    )
    assert workspace([leading], streamed=True) == 3 * d * m * 4
    assert dropped([leading], 1, streamed=True) == layers * 2 * d * m * 4
    assert dropped([leading], 1) == layers * d * d * 4
    # B and E, Q and its product with U; then the two decompositions at ten times 2 m³.
    flops = flops_of_one(leading, streamed=True)
    assert flops == pytest.approx(2 * 2 * d * m**2 + 4 * d * m**2 + 2 * d * m**2 + 40 * m**3)


def test_a_sketch_that_a_bias_makes_none_is_no_sketch():
    """Its moment has a column less than the factor, and as many as the sketch: it is summed."""
    d, k = 99, 45  # m = 98
    leading = Factor(
        None,
        jax.ShapeDtypeStruct((1, d, k), jnp.float32),
        jax.ShapeDtypeStruct((1, 1 + k), jnp.float32),
    )
    assert is_decomposed_whole(leading, streamed=True)
    assert workspace([leading], streamed=True) == 4 * d * d * 4
