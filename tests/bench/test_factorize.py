"""The script about curvatures without eigenvectors, once at toy size."""

import jax
import numpy as np
import pytest

from tests.bench.claims import factorize


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_all_three_ways_solve_the_same_system():
    found = factorize.speed(96)
    assert found["cholesky differs by"] < 1e-4
    assert found["newton-schulz differs by"] < 2e-3
    assert found["residual"] < 1e-3
    assert min(found[name] for name in ("eigh", "cholesky", "newton-schulz")) > 0
    ways = {"one call", "one by one"}
    assert set(factorize.batched(16, 2)) == ways | {f"{way}, LAPACK" for way in ways}


def test_rises_are_read_off_at_the_price_and_paired():
    def record(exact, factored):
        point = lambda rise: [(0.001, rise / 2), (0.1, 1.5 * rise)]  # noqa: E731
        points = {}
        for method, dampings in factorize.DAMPINGS.items():
            for damping in dampings:
                points[f"{method}, exact, {damping}"] = point(exact * (1 + damping))
                points[f"{method}, factored, {damping}"] = point(factored / (1 + damping))
        return {"points": points}

    found = factorize.summary([record(2.0, 1.0), record(4.0, 1.0)])["K-FADE"]
    assert found["best"] == {"exact": 1.0, "factored": 1e-3}
    ratio = found["factored over exact, log"]["each at its best"]["mean"]
    expected = np.mean(np.log([1 / 4, 1 / 8])) - np.log(1.001)
    np.testing.assert_allclose(ratio, expected, rtol=1e-9)
    assert np.isnan(factorize.at_price([(0.1, 1.0), (0.2, 2.0)]))


def test_both_dampings_forget_at_a_price():
    record = factorize.effect(0, quick=True)
    found = factorize.summary([record])
    for method, seen in found.items():
        for name, ((rise,)) in seen["rises"].items():
            # Where no two points are on both sides of the price, there is nothing to be read off.
            assert np.isnan(rise) or rise > 0, (method, name)
    for name, points in record["points"].items():
        assert np.isfinite(points).all(), name
        kls = [kl for kl, _ in points]
        assert kls == sorted(set(kls)), name
    rises = [rise for _, rise in record["points"]["K-FADE, factored, 0.01"]]
    assert rises == sorted(rises)
    assert rises[-1] > 0
