"""Recovery by component: known shares along known directions, and mistakes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.metrics import recovery_by_component

WIDTH, ROWS, SEQ = 4, 30, 3


def apply(params, x):
    return x @ params["w"]


def hidden(apply, params, x):
    return apply(params, x)


@pytest.fixture
def case():
    """Rows whose states vary along turned axes, by 3, 2, 1 and a tenth."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    x = np.linalg.qr(rng.normal(size=(ROWS * SEQ, WIDTH)) - 0.0)[0].reshape(ROWS, SEQ, WIDTH)
    x = x - x.mean(axis=(0, 1))
    x = np.linalg.qr(x.reshape(-1, WIDTH))[0].reshape(x.shape)
    return jnp.asarray(x), np.diag([3.0, 2.0, 1.0, 0.1]) @ turn.T, turn


def model(*along, turn):
    return {"w": jnp.asarray(np.diag(along) @ turn.T)}


def test_shares_are_those_that_were_put_in(case):
    x, w, turn = case
    original = {"w": jnp.asarray(w)}
    unlearned = model(3.0, 3.0, 0.5, 0.5, turn=turn)  # nothing along the first
    relearned = model(3.5, 2.25, 0.5, 0.3, turn=turn)  # three quarters, nothing, a half
    retrained = model(3.0, 2.5, 0.6, 0.1, turn=turn)
    models = (original, unlearned, relearned, retrained)
    found = recovery_by_component(hidden, apply, models, Batch(x))
    np.testing.assert_allclose(found.variance * x.size / WIDTH, [9, 4, 1, 0.01], rtol=1e-4)
    np.testing.assert_allclose(found.reverted, [np.nan, 0.75, 0, 0.5], atol=1e-5)
    np.testing.assert_allclose(found.ratio, [np.nan, -0.25, 0.2, 0.5], atol=1e-5)
    np.testing.assert_allclose(found.change * x.size / WIDTH, [0, 1, 0.25, 0.16], atol=1e-5)
    assert found.band(0, 3) == pytest.approx(0.75 / 1.25, abs=1e-5)
    assert found.band(1, None) == pytest.approx((0.75 + 0.08) / 1.41, abs=1e-5)
    assert np.isnan(found.band(0, 1))
    assert recovery_by_component(hidden, apply, models[:3], Batch(x)).ratio is None


def test_an_edit_that_hit_the_retrained_model_and_is_undone_has_ratio_minus_one(case):
    x, w, turn = case
    original, retrained = {"w": jnp.asarray(w)}, model(2.0, 3.0, 0.5, 0.4, turn=turn)
    undone = recovery_by_component(
        hidden, apply, (original, retrained, original, retrained), Batch(x)
    )
    np.testing.assert_allclose(undone.ratio, -1, atol=1e-4)
    np.testing.assert_allclose(undone.reverted, 1, atol=1e-4)
    kept = recovery_by_component(
        hidden, apply, (original, retrained, retrained, retrained), Batch(x)
    )
    np.testing.assert_allclose([kept.ratio, kept.reverted], 0, atol=1e-4)


def test_positions_that_do_not_count_are_not_looked_at(case):
    x, w, turn = case
    models = (
        {"w": jnp.asarray(w)},
        model(3.0, 3.0, 0.5, 0.5, turn=turn),
        {"w": jnp.asarray(0.9 * w)},
    )
    mask = np.ones((ROWS, SEQ), int)
    mask[::2, 1] = 0
    found = recovery_by_component(hidden, apply, models, Batch(x, mask=jnp.asarray(mask)))
    garbage = jnp.where(jnp.asarray(mask)[..., None] == 0, 1e3, x)
    again = recovery_by_component(hidden, apply, models, Batch(garbage, mask=jnp.asarray(mask)))
    for one, other in zip(found[:3], again[:3], strict=True):
        np.testing.assert_allclose(one, other)


def test_mistakes_get_a_sentence(case):
    x, w, _ = case
    params = {"w": jnp.asarray(w)}
    with pytest.raises(ValueError, match="the original, the unlearned, the relearned"):
        recovery_by_component(hidden, apply, (params, params), Batch(x))
    mask = jnp.zeros((ROWS, SEQ), int)
    with pytest.raises(ValueError, match="count no position"):
        recovery_by_component(hidden, apply, (params,) * 3, Batch(x, mask=mask))
    broken = {"w": jnp.full((WIDTH, WIDTH), jnp.nan)}
    with pytest.raises(FloatingPointError, match="not finite"):
        recovery_by_component(hidden, apply, (params, broken, params), Batch(x))
