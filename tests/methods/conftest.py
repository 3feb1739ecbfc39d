"""What the methods that train are tried on, unless a file has a scene of its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch


@pytest.fixture
def scene():
    """Params of a network of one hidden layer, six forget rows and nine retain rows."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 5))), "v": jnp.asarray(rng.normal(size=(5, 3)))}
    sets = [
        Batch(jnp.asarray(rng.normal(size=(n, 4))), jnp.asarray(rng.integers(0, 3, n)))
        for n in (6, 9)
    ]
    return params, *sets
