"""The temperature by how saturated a model is, against the same traces in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jedit.core.batch import Batch
from jedit.curvature.temperature import choose_temperature


def apply(params, inputs):
    return inputs @ params["w"]


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 1.0), (24.0, 2.0), (45.0, 4.0), (900, 8.0)])
def test_the_lowest_temperature_with_enough_trace(scale, expected):
    rng = np.random.default_rng(0)
    inputs, w = rng.normal(size=(40, 6)), scale * rng.normal(size=(6, 5)) / np.sqrt(6)
    mask = np.arange(40) % 3 > 0
    dtype = jnp.zeros(()).dtype
    rows = [
        Batch(jnp.asarray(inputs[part], dtype), None, jnp.asarray(mask[part], dtype))
        for part in (slice(15), slice(15, 40))
    ]
    found = choose_temperature(apply, {"w": jnp.asarray(w, dtype)}, rows)
    traces = {}
    for temperature in (1.0, 2.0, 4.0, 8.0):
        p = special.softmax(inputs @ w / temperature, axis=1)[mask]
        traces[temperature] = np.mean(1 - np.sum(p**2, axis=1))
    enough = [t for t, trace in traces.items() if trace >= 0.1]
    assert found == (enough[0] if enough else 8.0)
    assert found == expected


def test_what_is_refused():
    rows = Batch(jnp.ones((2, 3)), None, jnp.zeros(2))
    with pytest.raises(ValueError, match="count no output"):
        choose_temperature(apply, {"w": jnp.ones((3, 2))}, rows)
    with pytest.raises(ValueError, match="least must be above 0 and at most 1"):
        choose_temperature(apply, {"w": jnp.ones((3, 2))}, rows, least=0.0)
