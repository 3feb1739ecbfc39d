"""Sparse autoencoders against dictionaries that were planted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jedit.methods import fit_autoencoder
from jedit.methods.latents._autoencoder import top


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """Optax mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def planted():
    """States that are sums of three out of 24 directions in 16 dimensions, and what was found."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(24, 16))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    on = np.argsort(rng.random((4000, 24)), axis=1)[:, :3]
    weights = np.zeros((4000, 24))
    np.put_along_axis(weights, on, rng.uniform(0.5, 1.5, size=(4000, 3)), axis=1)
    offset = rng.normal(size=16)
    states = 3 * (weights @ atoms + offset + 0.01 * rng.normal(size=(4000, 16)))
    made, info = fit_autoencoder(
        jnp.asarray(states), latents=32, active=3, key=jax.random.key(1), epochs=60
    )
    return atoms, weights, states, made, info


def test_a_planted_dictionary_is_found_again(planted):
    atoms, weights, _, made, info = planted
    cosine = np.asarray(made.decoder) @ atoms.T
    mine, theirs = linear_sum_assignment(-cosine)
    matched = cosine[mine, theirs]
    # Directions in so few dimensions overlap; a random dictionary reaches 0.6.
    assert np.median(matched) > 0.98
    assert np.mean(matched > 0.9) >= 0.85
    assert info.explained_variance > 0.9
    assert info.active <= 3 + 1e-5  # a mean
    assert info.dead <= 8 / 32  # more latents than there are atoms
    # What is on is what was planted.
    assert len(mine) == 24
    z = np.asarray(made.encode(jnp.asarray(planted[2])))
    agree = np.mean((z[:, mine] > 0) == (weights[:, theirs] > 0))
    assert agree > 0.93


def test_it_computes_what_it_says(planted, tolerance):
    _, _, states, made, info = planted
    h = states[:50] / float(made.scale) - np.asarray(made.decoder_bias)
    raw = np.maximum(h @ np.asarray(made.encoder) + np.asarray(made.encoder_bias), 0)
    expected = np.zeros_like(raw)
    for row, out in zip(raw, expected, strict=True):
        for i in sorted(range(32), key=lambda i: -row[i])[:3]:  # noqa: B023
            out[i] = row[i]
    tolerance.check(made.encode(jnp.asarray(states[:50])), expected)
    back = (expected @ np.asarray(made.decoder) + np.asarray(made.decoder_bias)) * float(made.scale)
    tolerance.check(made.decode(jnp.asarray(expected)), back)
    np.testing.assert_allclose(np.linalg.norm(made.decoder, axis=1), 1, rtol=1e-5)
    whole = np.asarray(made.decode(made.encode(jnp.asarray(states))))
    lost = np.sum((states - whole) ** 2) / np.sum((states - states.mean(axis=0)) ** 2)
    assert info.explained_variance == pytest.approx(1 - lost, abs=1e-5)


def test_what_is_dead_is_revived():
    rng = np.random.default_rng(2)
    # Nearly all in one plane: directions across it are nowhere the largest.
    states = jnp.asarray(rng.normal(size=(512, 6)) * np.array([3, 3, 0.1, 0.1, 0.1, 0.1]))
    how = {"latents": 64, "active": 1, "epochs": 400, "batch_size": 512}
    _, alone = fit_autoencoder(states, revival=0.0, key=jax.random.key(0), **how)
    _, helped = fit_autoencoder(states, revival=0.5, key=jax.random.key(0), **how)
    assert alone.dead > 0.2
    assert helped.dead < 0.7 * alone.dead


def test_no_more_than_so_many_are_on_among_equals():
    assert np.sum(np.asarray(top(jnp.ones((2, 5)), 3)) > 0) == 6


def test_mistakes_get_a_sentence():
    states, key = jnp.ones((4, 3)), jax.random.key(0)
    with pytest.raises(ValueError, match="all alike"):
        fit_autoencoder(states, latents=4, active=2, key=key)
    with pytest.raises(ValueError, match="active=5 latents cannot be on of latents=4"):
        fit_autoencoder(states, latents=4, active=5, key=key)
    with pytest.raises(ValueError, match="there are no states"):
        fit_autoencoder(states[:0], latents=4, active=2, key=key)
