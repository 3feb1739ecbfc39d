"""Change by group, nearness and rank correlation, against NumPy, SciPy and known geometry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jedit.core.batch import Batch
from jedit.metrics import change_by_group, nearness, rank_correlation


def apply(params, x):
    return x @ params


def hidden(apply, params, x):
    return apply(params, x)


def test_changes_are_paired_by_row():
    rng = np.random.default_rng(0)
    before, groups = rng.random(30), [f"g{i % 3}" for i in range(30)]
    after = before - 0.2 + 0.05 * rng.normal(size=30)
    found = change_by_group(before, after, groups)
    assert list(found) == ["g0", "g1", "g2"]
    for i, change in enumerate(found.values()):
        a, b = before[i::3], after[i::3]
        expected = stats.ttest_rel(b, a).confidence_interval(0.95)
        np.testing.assert_allclose([change.low, change.high], expected)
        np.testing.assert_allclose(change[:3], [a.mean(), b.mean(), (b - a).mean()])
        assert change.num_rows == 10
    one = change_by_group([0.9], [0.1], ["a"])["a"]
    assert np.isnan(one.low)
    assert np.isnan(one.high)
    with pytest.raises(ValueError, match="a group for each row"):
        change_by_group(before, after[1:], groups)
    with pytest.raises(ValueError, match="finite"):
        change_by_group(before, np.where(before > 0.5, np.nan, after), groups)


@pytest.mark.parametrize(
    ("up", "down", "stay"), [(4, 0, 0), (0, 0, 4), (0, 9, 1), (7, 2, 30), (1, 0, 0)]
)
def test_rows_that_all_go_one_way_are_not_certain(up, down, stay):
    """Agresti and Min's interval by its counts: n21 - n12 of n, each cell with half a row more."""
    before = [0] * up + [1] * down + [1] * stay
    after = [1] * up + [0] * down + [1] * stay
    found = change_by_group(before, after, ["a"] * len(before))["a"]
    n21, n12, n = up + 0.5, down + 0.5, up + down + stay + 2
    middle = (n21 - n12) / n
    half = stats.norm.ppf(0.975) * np.sqrt(n21 + n12 - (n21 - n12) ** 2 / n) / n
    assert found.low == pytest.approx(max(middle - half, -1))
    assert found.high == pytest.approx(min(middle + half, 1))
    assert found.low < found.high
    assert found.low <= found.change <= found.high
    assert found.change == pytest.approx((up - down) / len(before))


def test_nearness_is_a_cosine_about_what_all_groups_share(tolerance):
    """Three groups at known places around a point far away, the forget rows at a fourth."""
    rng = np.random.default_rng(1)
    params = np.diag([1.0, 2.0, 0.5])  # not seen by whoever looks at the inputs
    places = {"near": [1.0, 1.0, 0.0], "side": [-1.0, 1.0, 0.0], "far": [0.0, -2.0, 0.0]}
    rows, masks = {}, {}
    for name, place in {**places, "forget": [3.0, 3.0, 0.0]}.items():
        noise = rng.normal(size=(4, 2, 3))
        mask = np.array([[1, 0], [1, 1], [0, 1], [1, 0]], np.float32)
        noise -= (noise * mask[..., None]).sum((0, 1)) / mask.sum()
        states = 50.0 + np.array(place) + noise
        rows[name], masks[name] = states @ np.linalg.inv(params), mask
    batches = {n: Batch(jnp.asarray(x), mask=jnp.asarray(masks[n])) for n, x in rows.items()}
    forget = batches.pop("forget")
    found = nearness(apply, jnp.asarray(params), forget, batches, hidden=hidden)
    tolerance.check(found["near"], 1.0)
    assert found["side"] == pytest.approx(0, abs=1e-4)
    tolerance.check(found["far"], -np.sqrt(0.5))
    # In two batches, the same.
    halves = [jax.tree.map(lambda x, s=s: x[s], forget) for s in (slice(0, 2), slice(2, 4))]
    again = nearness(apply, jnp.asarray(params), halves, batches, hidden=hidden)
    tolerance.check(again["far"], found["far"])


def test_nearness_wants_groups_that_differ():
    rows = Batch(jnp.ones((2, 3, 2)))
    with pytest.raises(ValueError, match="two groups"):
        nearness(apply, jnp.eye(2), rows, {"a": rows}, hidden=hidden)
    with pytest.raises(ValueError, match="no angle"):
        nearness(apply, jnp.eye(2), rows, {"a": rows, "b": rows}, hidden=hidden)
    broken = rows._replace(inputs=jnp.full((2, 3, 2), jnp.nan))
    with pytest.raises(FloatingPointError, match="states of 'b' are not finite"):
        nearness(apply, jnp.eye(2), rows, {"a": rows, "b": broken}, hidden=hidden)
    none = rows._replace(mask=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="'b' count no output"):
        nearness(apply, jnp.eye(2), rows, {"a": rows, "b": none}, hidden=hidden)


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 5, 12), rng.normal(size=12)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation([1, 2, 3], [-1, -8, -9]) == pytest.approx(-1)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert np.isnan(rank_correlation([1, 2, np.nan], [1, 2, 3]))
    with pytest.raises(ValueError, match="as many"):
        rank_correlation([1, 2], [1, 2, 3])
