"""The price of an edit where the request's inputs are hardly, or never, met in the retain rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, factors, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import dense
from jedit.requests import Solver, batch_unlearn

D_IN, D_OUT, DEAD = 24, 7, 4
PRICE = 0.01


def apply(params, x):
    return x @ params["w"]


def scene(by):
    """Retain rows of scales from 1 to 1/1000 whose last features are zero, and three requests."""
    rng = np.random.default_rng(0)
    scales = np.concatenate([np.geomspace(1, 1e-3, D_IN - DEAD), np.zeros(DEAD)])
    rows = rng.standard_normal((400, D_IN)) * scales
    params = {"w": jnp.asarray(rng.standard_normal((D_IN, D_OUT)), jnp.float32)}
    estimator = kfac(apply, Categorical(), fisher="exact", factorize=by)
    batch = Batch(jnp.asarray(rows, jnp.float32))
    curvature = estimate(estimator, params, [batch], key=jax.random.key(0))
    # Alike but for how much of what the retain rows know is in them; the last has nothing of it.
    dead = np.arange(D_IN) >= D_IN - DEAD
    known = np.array([1e-2, 1e-4, 0])[:, None, None]
    asked = rng.standard_normal((1, 1, D_IN)) * np.where(dead, 1, known)
    requests = Batch(jnp.asarray(asked, jnp.float32), jnp.full((3, 1), 2))
    return params, curvature, requests


@pytest.mark.parametrize("by", ["eigh", "cholesky"])
@pytest.mark.parametrize("rank", [None, 1])
def test_an_edit_costs_what_was_asked_wherever_its_inputs_lie(by, rank):
    """Told and asked, in float32, beside ½ ΔᵀFΔ of the edit itself, in float64."""
    with jax.enable_x64(False):
        params, curvature, requests = scene(by)
        edits, info = batch_unlearn(
            apply,
            params,
            curvature,
            requests,
            predicted_kl=PRICE,
            damping=1e-4,
            solver=Solver(rank=rank),
        )
    A, G = (np.asarray(x, np.float64) for x in factors(curvature, "w"))
    for r in range(3):
        step = np.asarray(dense(jax.tree.map(lambda x, r=r: x[r], edits.blocks["w"])), np.float64)
        cost = 0.5 * np.sum(step * (A @ step @ G))
        # What costs nothing has no step of that price, and none is made of rounding.
        asked = PRICE if r < 2 else 0.0
        np.testing.assert_allclose(cost, asked, rtol=1e-4)
        np.testing.assert_allclose(info.predicted_kl[r], asked, rtol=1e-4)
        assert (info.step_size[r] > 0) == (r < 2)
