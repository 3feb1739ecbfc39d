"""Consolidation in parts: what is trained, rows that count, tasks of unlike size, second sites."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jedit.core.batch import Batch
from jedit.curvature import diagonal
from jedit.curvature.likelihoods import Categorical
from jedit.methods import EWC, activation_intervals, anchored, ogd, stored_gradients
from jedit.objectives import LearnNLL
from jedit.training import LoopState, unlearn
from tests.curvature.references import dense_fisher
from tests.methods.test_consolidation import (
    EXACT,
    apply,
    dense_penalty,
    logit_gradients,
    model,
    rows,
)


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """Optax mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.float64
def test_tasks_of_unlike_size_weigh_by_their_outputs_unless_they_stand_apart():
    params, now, few = model(0), model(2), rows(4, 4)
    sets = rows(3, 24), few._replace(inputs=3 * few.inputs)
    estimator = diagonal(apply, Categorical(), **EXACT)
    keys = jax.random.split(jax.random.key(0), 3)
    apart = tuple(anchored(estimator, params, b, key=k) for b, k in zip(sets, keys, strict=False))
    both = anchored(estimator, params, sets[1], key=keys[2], before=apart[0])
    penalties = [
        dense_penalty(params, now, np.diag(np.diag(dense_fisher(apply, Categorical(), params, b))))
        for b in sets
    ]
    expected = 2 * np.average(penalties, weights=[float(jnp.sum(b.mask)) for b in sets])
    assert EWC()(apply, now, reference=both)[0] == pytest.approx(expected, rel=1e-10)
    assert EWC()(apply, now, reference=apart)[0] == pytest.approx(sum(penalties), rel=1e-10)
    assert abs(expected / sum(penalties) - 1) > 0.02


def test_ogd_of_a_part_is_orthogonal_in_that_part():
    """A basis of the whole tree would be none of the part: the frozen rest takes of its length."""
    params, task = model(0), rows(3, 8)
    stored = stored_gradients(
        apply, params, task, rank=8, samples=8, key=jax.random.key(0), trainable="w2|b1"
    )
    method = ogd(LearnNLL(), optax.adam(1e-3))._replace(trainable="w2|b1")
    start = LoopState(0, params, None, stored)
    after, _ = unlearn(method, apply, start, rows(5), steps=5, key=jax.random.key(1))
    change = np.asarray(ravel_pytree(after)[0] - ravel_pytree(params)[0], np.float64)
    assert np.linalg.norm(change) > 1e-3
    assert np.array_equal(after["w1"], params["w1"])
    gradients = logit_gradients(params, task).astype(np.float64)
    sizes = np.linalg.norm(gradients, axis=1) * np.linalg.norm(change)
    assert np.all(np.abs(gradients @ change) <= 1e-4 * sizes + 1e-12)


def test_a_store_has_room_for_rows_that_count_alone_and_passes_integers_over():
    """Of three rows one counts: however they are drawn, a store for one gradient holds its."""
    params = {**model(0), "step": jnp.asarray(3)}
    task = rows(3, 3)._replace(mask=jnp.asarray([0.0, 1.0, 0.0]))
    expected = logit_gradients(model(0), task)[1]
    for seed in range(4):
        stored = stored_gradients(apply, params, task, rank=1, samples=3, key=jax.random.key(seed))
        rest = {k: x[0] for k, x in stored.gradients.rows.items() if k != "step"}
        np.testing.assert_allclose(ravel_pytree(rest)[0], expected, atol=1e-5)
        assert not np.any(stored.gradients.rows["step"])
    none = task._replace(mask=jnp.zeros(3))
    with pytest.raises(ValueError, match="count no output"):
        stored_gradients(apply, params, none, rank=1, samples=3, key=jax.random.key(9))


def test_a_matrix_that_is_used_twice_has_two_sites(tolerance):
    """Its second use is named "#1", and has intervals of its own."""

    def twice(params, inputs):
        return jnp.tanh(jnp.tanh(inputs @ params["w"]) @ params["w"])

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 4)))}
    batch = Batch(jnp.asarray(rng.normal(size=(9, 4))), jnp.zeros(9, jnp.int32), None, None)
    found = activation_intervals(twice, params, batch, ("w", "w#1"), share=0.0)
    inside = np.tanh(np.asarray(batch.inputs) @ np.asarray(params["w"]))
    tolerance.check(found.lower["w#1"], inside.min(axis=0))
    tolerance.check(found.upper["w"], np.asarray(batch.inputs).max(axis=0))
