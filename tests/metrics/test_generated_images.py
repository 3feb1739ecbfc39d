"""What generated images are measured by, against SciPy and against plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from jedit.metrics import frechet_distance, memorised_samples


def test_a_frechet_distance_is_scipys():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + 0.3
    y = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5))
    s, t = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(s @ t)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s + t - 2 * root.real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-8)
    assert frechet_distance(x, x + 2) == pytest.approx(20, rel=1e-6)
    one = frechet_distance(x[:, :1], y[:, :1])
    spread = np.std(x[:, 0], ddof=1) - np.std(y[:, 0], ddof=1)
    assert one == pytest.approx((x[:, 0].mean() - y[:, 0].mean()) ** 2 + spread**2, rel=1e-8)
    with pytest.raises(ValueError, match="features of one width"):
        frechet_distance(x[:1], y)


@pytest.mark.parametrize("threshold", [1 / 3, 0.9])
def test_a_copy_is_much_nearer_to_its_own_image_than_to_any_other(threshold):
    rng = np.random.default_rng(0)
    others = rng.normal(size=(9, 4))
    own = others[[0, 1, 2, 3, 4, 5]]
    samples = own + rng.normal(size=(6, 4)) * np.asarray([0, 0.1, 0.3, 0.6, 1.0, 3.0])[:, None]
    expected = []
    for x, a in zip(samples, own, strict=True):
        rest = [np.linalg.norm(x - b) for b in others if not np.array_equal(a, b)]
        expected.append(np.linalg.norm(x - a) < threshold * min(rest))
    given = (jnp.asarray(x) for x in (samples, own, others))
    assert memorised_samples(*given, threshold=threshold).tolist() == expected
    assert 0 < sum(expected) < 6
    with pytest.raises(ValueError, match="others holds no image"):
        memorised_samples(jnp.asarray(samples), jnp.asarray(own), jnp.zeros((0, 4)))
