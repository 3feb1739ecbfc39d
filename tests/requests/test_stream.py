"""A stream of requests against estimates that never saw the rows, and losses taken by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac, quadratic_form
from jedit.curvature.likelihoods import Categorical
from jedit.models import gpt
from jedit.objectives import GA
from jedit.requests.stream import Answering, Refresh, age, continual

ROWS, SEQ, VOCAB = 9, 5, 7
KEY = 3
RISE = 0.5  # nats from what row 4 has to what is enough
ANSWERING = Answering(tries=20, damping=0.3, relearn=0)
REFRESH = Refresh(every=100, probe=4, chunk=4)


@pytest.fixture(scope="module")
def scene():
    """A GPT of one block, sampled K-FAC of a part of it, and rows whose end is padding."""
    rng = np.random.default_rng(0)
    dtype = jnp.zeros(()).dtype
    apply, params = gpt(
        key=jax.random.key(0),
        vocab=VOCAB,
        width=8,
        num_layers=1,
        num_heads=2,
        max_len=SEQ,
        dtype=dtype,
    )
    tokens = rng.integers(0, VOCAB, (ROWS, SEQ + 1)).astype(np.int32)
    valid = (np.arange(SEQ) < rng.integers(3, SEQ + 1, (ROWS, 1))).astype(np.float32)
    data = Batch(tokens[:, :-1], tokens[:, 1:], valid, valid)
    return apply, params, kfac(apply, Categorical(), select="mlp|query|embed"), data


def stream_of(scene, **changed):
    apply, params, estimator, data = scene
    settings = {"enough": loss_of(scene, params, [4]) + RISE, "predicted_kl": 0.05}
    for default in (ANSWERING, REFRESH):
        own = {name: changed.pop(name) for name in vars(default) if name in changed}
        settings[type(default).__name__.lower()] = dataclasses.replace(default, **own)
    stream = continual(apply, estimator, data, key=jax.random.key(KEY), **settings | changed)
    return stream, stream.init(params)


def without(data, numbers):
    """The data with some rows that count nowhere."""
    kept = np.ones((ROWS, 1), np.float32)
    kept[numbers] = 0
    return jax.tree.map(jnp.asarray, data._replace(mask=data.mask * kept, valid=data.valid * kept))


def loss_of(scene, params, numbers):
    apply, _, _, data = scene
    losses = [
        -GA()(apply, params, jax.tree.map(lambda x, i=i: jnp.asarray(x[i : i + 1]), data))[0]
        for i in numbers
    ]
    return float(np.mean(losses))


def factors(curvature):
    return {name: factor.matrix for name, factor in curvature.factors.items()}


def same(one, other, **tolerance):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_what_protects_forgets_the_rows_as_if_it_had_never_seen_them(scene):
    _, params, estimator, data = scene
    stream, state = stream_of(scene, request_size=2, every=2, max_age=1e9)
    before = factors(state.curvature)
    state, _ = stream.forget(state, [5])
    same(factors(state.curvature), before, rtol=0)  # decomposed every second request
    state, info = stream.forget(state, [2, 7])
    assert info.refresh == "decomposed"
    never_seen = estimate(estimator, params, [without(data, [2, 5, 7])], key=jax.random.key(KEY))
    precision = 1e-10 if jnp.zeros(()).dtype == jnp.float64 else 1e-4
    same(factors(state.curvature), factors(never_seen), rtol=precision, atol=precision)
    assert int(state.curvature.num_outputs) == int(never_seen.num_outputs)


def test_a_request_gets_the_least_edit_that_does(scene):
    stream, state = stream_of(scene)
    before = loss_of(scene, state.params, [4])
    after, info = stream.forget(state, [4])
    assert info.num_edited == info.num_new == 1
    assert info.loss_before == pytest.approx(before, rel=1e-4)
    assert info.loss_after == pytest.approx(loss_of(scene, after.params, [4]), rel=1e-4)
    # A rung below is a 2^(1/3)th shorter, and would not do.
    assert before + RISE <= info.loss_after < before + 2 * RISE
    assert 0 < info.predicted_kl <= info.tries * 0.05


def test_an_edit_is_predicted_to_cost_no_more_than_was_said(scene):
    stream, state = stream_of(scene, predicted_kl=1e-4, tries=2)
    after, info = stream.forget(state, [4])
    assert info.tries == 2
    assert info.predicted_kl == pytest.approx(2e-4, rel=1e-3)
    assert info.loss_before < info.loss_after < info.loss_before + RISE
    assert info.loss_after == pytest.approx(loss_of(scene, after.params, [4]), rel=1e-4)


def test_rows_asked_for_again_or_known_no_more_change_nothing(scene):
    stream, state = stream_of(scene, request_size=2)
    state, _ = stream.forget(state, [4])
    again, info = stream.forget(state, [4])
    assert (info.num_new, info.num_edited, info.tries) == (0, 0, 0)
    same((again.params, again.sums), (state.params, state.sums), rtol=0)
    # The same row under another number: forgotten with the first, and filtered by its loss.
    apply, params, estimator, data = scene
    doubled = jax.tree.map(lambda x: np.concatenate([x, x[4:5]]), data)
    stream, state = stream_of((apply, params, estimator, doubled), request_size=2)
    state, _ = stream.forget(state, [4])
    after, info = stream.forget(state, [ROWS])
    assert (info.num_new, info.num_edited) == (1, 0)
    same(after.params, state.params, rtol=0)
    assert after.gone[ROWS]
    assert int(after.sums.num_outputs) < int(state.sums.num_outputs)


def test_old_statistics_are_taken_anew_where_the_model_is(scene):
    _, _, estimator, data = scene
    stream, state = stream_of(scene, every=2, max_age=1e-6, enough=50.0, tries=1)
    state, info = stream.forget(state, [1])
    assert (info.refresh, np.isnan(info.age)) == (None, True)
    state, info = stream.forget(state, [6])
    assert info.refresh == "estimated"
    assert info.age > 1e-6
    now = estimate(estimator, state.params, [without(data, [1, 6])], key=jax.random.key(KEY))
    precision = 1e-10 if jnp.zeros(()).dtype == jnp.float64 else 1e-4
    same(factors(state.curvature), factors(now), rtol=precision, atol=precision)
    assert state.inverse is None
    state, info = stream.forget(state, [0])
    assert info.refresh is None


def test_no_damping_is_refused_before_the_pass_where_factors_are_inverted(scene):
    apply, params, _, data = scene

    def update(*_):
        raise AssertionError

    estimator = kfac(apply, Categorical(), factorize="cholesky")._replace(update=update)
    with pytest.raises(ValueError, match="give a damping above zero"):
        stream_of((apply, params, estimator, data), damping=0.0)


def test_the_age_is_none_at_the_same_params_and_grows_with_the_distance(scene):
    apply, params, estimator, data = scene
    batch = jax.tree.map(jnp.asarray, data)

    def sums(scale):
        moved = jax.tree.map(lambda x: x * (1 + scale), params)
        state = estimator.init(moved, batch)
        return estimator.update(state, moved, batch, jax.random.key(0))

    assert age(sums(0.0), sums(0.0)) == 0
    assert 0 < age(sums(0.0), sums(0.01)) < age(sums(0.0), sums(0.2))


def test_what_is_kept_is_learnt_again(scene):
    stream, state = stream_of(scene)
    assert state.inverse is None  # which is as large as the curvature, and nobody would use it
    without_it, info = stream.forget(state, [4])
    assert np.isnan(info.kept_loss)
    stream, state = stream_of(scene, relearn=20)
    restored, info = stream.forget(state, [4])
    kept = [i for i in range(ROWS) if i != 4]
    _, _, _, data = scene
    counts = data.mask.sum(axis=1)[kept]
    losses = [loss_of(scene, without_it.params, [i]) for i in kept]
    assert info.kept_loss == pytest.approx(np.average(losses, weights=counts), rel=1e-4)
    again = [loss_of(scene, restored.params, [i]) for i in kept]
    assert np.average(again, weights=counts) < info.kept_loss
    # A natural step of half the squared length that is allowed, at most.
    change = jax.tree.map(jnp.subtract, restored.params, without_it.params)
    assert 0 < float(quadratic_form(state.curvature, change)) <= 2 * 0.05 * (1 + 1e-4)
    # A request that changes nothing costs nothing.
    again, info = stream.forget(restored, [4])
    same(again.params, restored.params, rtol=0)


@pytest.mark.parametrize("numbers", [[], [ROWS], [-1], [0, 1, 2]])
def test_requests_that_cannot_be_answered_are_refused(scene, numbers):
    stream, state = stream_of(scene, request_size=2)
    with pytest.raises(ValueError, match=r"1 to 2 rows \(request_size\)"):
        stream.forget(state, numbers)


@pytest.mark.parametrize("changed", [{"enough": 0.0}, {"predicted_kl": -1.0}, {"every": 0}])
def test_settings_that_mean_nothing_are_refused(scene, changed):
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"{name} must be (positive|at least 1), got"):
        stream_of(scene, **changed)


def test_data_without_targets_are_refused(scene):
    apply, _, estimator, data = scene
    with pytest.raises(ValueError, match="need targets"):
        continual(
            apply,
            estimator,
            data._replace(targets=None),
            enough=1.0,
            predicted_kl=0.05,
            key=jax.random.key(KEY),
        )
