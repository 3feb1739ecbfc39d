"""Where the entries of a site's matrix stand in its leaf, against a leaf that is numbered."""

import jax.numpy as jnp
import numpy as np
import pytest

from jedit.tracing import find_sites
from tests.steering.test_steering import PROGRAMS, normal


@pytest.mark.parametrize("name", PROGRAMS)
def test_they_are_where_a_numbered_leaf_says(name):
    apply, shapes, inputs, _ = PROGRAMS[name]
    params = {key: normal(i, *shape) for i, (key, shape) in enumerate(shapes.items())}
    for site in find_sites(apply, params, inputs).values():
        weight = site.weight
        parts = [weight.kernel] if weight.bias_path is None else [weight.kernel, weight.bias_row]
        for part in parts:
            numbers = np.indices(part.shape)
            for axis, leaf in enumerate(numbers):
                expected = np.asarray(part.gather({part.path: jnp.asarray(leaf)}))
                found = np.broadcast_to(part.places(axis), expected.shape)
                np.testing.assert_array_equal(found, expected)


def test_a_large_leaf_costs_no_memory():
    def apply(params, x):
        return x @ params["w"][5].T

    params, x = {"w": jnp.zeros((8, 3, 4))}, jnp.ones((2, 4))
    weight = find_sites(apply, params, x)["w"].weight
    assert [weight.places(axis).shape for axis in range(3)] == [(1, 1, 1), (1, 1, 3), (1, 4, 1)]
    assert weight.places(0).item() == 5
