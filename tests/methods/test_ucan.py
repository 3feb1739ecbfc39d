"""U-CAN against activations that are there, and as what it says: outputs times a factor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import apply_edit
from jedit.methods import ucan

D_IN, WIDTH, CLASSES = 6, 8, 3


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


ESTIMATOR = kfac(network, Categorical(), select="w|b")


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(4)
    shapes = {"w": (D_IN, WIDTH), "b": (WIDTH,), "v": (WIDTH, CLASSES)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    spreads = np.geomspace(2, 0.2, D_IN), np.geomspace(0.2, 2, D_IN)
    sets = [jnp.asarray(rng.normal(size=(20, D_IN)) * spread) for spread in spreads]
    labels = jnp.asarray(rng.integers(0, CLASSES, 20))
    moments = [estimate(ESTIMATOR, params, [Batch(x, labels)], key=jax.random.key(1)) for x in sets]
    return params, *sets, *moments


@pytest.mark.parametrize(("least_risk", "strength"), [(0.0, 8.0), (0.15, 2.5)])
def test_risk_utility_and_decay_are_those_of_the_activations(
    scene, least_risk, strength, tolerance
):
    params, forget, retain, target, rest = scene
    edit, info = ucan(params, target, rest, least_risk=least_risk, strength=strength)
    w, b, f, r = (np.asarray(x, np.float64) for x in (params["w"], params["b"], forget, retain))
    root = lambda x: np.sqrt(np.mean(x**2, axis=0))  # noqa: E731
    forgotten, kept = root(f @ w + b), root(r @ w + b)
    forgotten, kept = (x / np.sqrt(np.mean(x**2)) for x in (forgotten, kept))
    risk = np.maximum(0, (forgotten - kept) / (forgotten + kept))
    utility = np.sum(np.abs(w) * root(r)[:, None], axis=0)
    utility /= utility.max()
    decay = np.exp(-strength * (1 - utility) * np.maximum(0, risk - least_risk))
    assert 0 < np.sum(decay < 1) < WIDTH
    tolerance.check(info.risk["w"][0], risk, "factorization")
    tolerance.check(info.utility["w"][0], utility, "factorization")
    tolerance.check(info.kept["w"][0], decay, "factorization")
    edited = apply_edit(params, edit)
    expected = np.tanh((r @ w + b) * decay) @ np.asarray(params["v"], np.float64)
    tolerance.check(network(edited, retain), expected, "factorization")
    assert set(edit.blocks) == {"w", "b"}


def test_the_same_rows_in_both_sets_change_nothing(scene):
    params, _, _, target, _ = scene
    edit, info = ucan(params, target, target)
    assert all(np.all(np.asarray(block) == 0) for block in edit.blocks.values())
    assert np.all(np.asarray(info.kept["w"]) == 1)
