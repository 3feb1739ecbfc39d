"""Rounded weights against rounding by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jedit.attacks import quantize

pytest.importorskip("qwix")


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32), "bias": jnp.ones(5)},
        "b": {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.bfloat16)},
    }


@pytest.mark.parametrize(("bits", "levels"), [(4, 7.5), (8, 127.5)])
def test_each_column_has_its_own_levels(params, bits, levels):
    made = quantize(params, bits=bits)
    kernel = np.asarray(made["a"]["kernel"])
    top = 2 ** (bits - 1) - 1
    scale = np.abs(np.asarray(params["a"]["kernel"])).max(axis=0) / levels
    steps = kernel / scale
    assert np.all(np.abs(steps - np.round(steps)) < 1e-3 * levels)
    assert np.abs(steps).max() <= top + 1 + 1e-3
    # Nothing moves by more than half a step, but for what the largest level cuts off.
    moved = np.abs(kernel - np.asarray(params["a"]["kernel"]))
    assert np.all(moved <= 0.5 * scale * (1 + 1e-4))
    np.testing.assert_array_equal(made["a"]["bias"], params["a"]["bias"])
    assert made["b"]["kernel"].dtype == jnp.bfloat16


def test_a_small_edit_is_rounded_away_and_a_large_one_is_not(params):
    before = quantize(params, bits=4)["a"]["kernel"]
    small, large = (
        {"a": {"kernel": params["a"]["kernel"].at[3, 2].add(step)}} for step in (1e-4, 0.5)
    )
    assert np.all(quantize(small, bits=4)["a"]["kernel"] == before)
    assert np.any(quantize(large, bits=4)["a"]["kernel"] != before)


def test_selected_arrays_and_channels_alone(params):
    made = quantize(params, bits=8, select="^a/")
    assert np.any(made["a"]["kernel"] != params["a"]["kernel"])
    np.testing.assert_array_equal(made["b"]["kernel"], params["b"]["kernel"])
    by_row = quantize(params, bits=8, select="^a/", channel_axes=lambda *_: (0,))
    turned = quantize({"w": params["a"]["kernel"].T}, bits=8)
    np.testing.assert_allclose(by_row["a"]["kernel"], turned["w"].T, rtol=1e-6)


def test_columns_of_zeros_stay():
    made = quantize({"w": jnp.zeros((3, 2), jnp.float32)}, bits=4)
    np.testing.assert_array_equal(made["w"], np.zeros((3, 2)))


def test_refusals(params):
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        quantize(params, bits=3)
    with pytest.raises(ValueError, match="finds no array"):
        quantize(params, bits=8, select="^c/")
