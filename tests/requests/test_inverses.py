"""Inverses of damped factors that many requests share: how they are compiled, and on a mesh."""

import jax
import jax.numpy as jnp

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.cholesky import SHORTEST
from jedit.curvature.likelihoods import Categorical
from jedit.models import mlp
from jedit.requests import batch_unlearn, solution

SIZES = [SHORTEST] * 3 + [5]


def scene(seed=0):
    """A perceptron with factors that are long enough for products, and two requests."""
    dtype = jnp.zeros(()).dtype
    keys = jax.random.split(jax.random.key(seed), 5)
    apply, params = mlp(key=keys[0], sizes=SIZES, activation=jnp.tanh, dtype=dtype)
    estimator = kfac(apply, Categorical(), fisher="empirical", factorize="cholesky")
    rows = jax.random.normal(keys[1], (32, SIZES[0]), dtype)
    labels = jax.random.randint(keys[2], (32,), 0, SIZES[-1])
    curvature = estimate(estimator, params, [Batch(rows, labels)], key=keys[3])
    asked = jax.random.normal(keys[4], (2, 1, SIZES[0]), dtype)
    return apply, params, curvature, Batch(asked, jnp.ones((2, 1), int))


def test_factors_of_one_shape_are_inverted_by_one_program():
    apply, params, curvature, requests = scene()
    shapes = {f.matrix.shape for f in curvature.factors.values()}
    assert len(shapes) < len(curvature.factors)  # else nothing is shared here
    solution._inverse.clear_cache()
    batch_unlearn(apply, params, curvature, requests)
    assert solution._inverse._cache_size() == len(shapes)


def test_models_side_by_side_invert_long_factors(tolerance):
    apply, *_, requests = scene()
    models = [scene(seed)[1:3] for seed in (0, 1)]

    def edit(params, curvature):
        return batch_unlearn(apply, params, curvature, requests, predicted_kl=1e-3)[1]

    stacked = (jax.tree.map(lambda *xs: jnp.stack(xs), *x) for x in zip(*models, strict=True))
    together = jax.vmap(edit)(*stacked)
    for i, model in enumerate(models):
        alone = edit(*model)
        tolerance.check(jax.tree.map(lambda x, i=i: x[i], together), alone, kind="factorization")
