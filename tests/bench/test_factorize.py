"""The script about curvatures without eigenvectors, once at toy size."""

import jax
import numpy as np
import pytest

from jedit import metrics
from tests.bench.claims import factorize, metric
from tests.bench.claims.scenes import digits


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


def test_what_is_forgotten_is_read_off_at_the_price_and_paired():
    def record(exact, factored):
        nll = {}
        for method, dampings in factorize.DAMPINGS.items():
            for damping in dampings:
                nll[f"{method}, exact, {damping}"] = exact * (1 + damping)
                nll[f"{method}, factored, {damping}"] = factored / (1 + damping)
        return {"nll": nll}

    missed = record(2.0, 1.0)
    missed["nll"]["K-FADE, exact, 1.0"] = float("nan")
    found = factorize.summary([record(2.0, 1.0), record(4.0, 1.0), missed])["K-FADE"]
    # One seed has no number at a damping of 1, which is the best of the other two.
    assert found["best"] == {"exact": 0.1, "factored": 1e-5}
    ratio = found["factored over exact, log"]["each at its best"]["mean"]
    expected = np.mean(np.log([1 / 2, 1 / 4, 1 / 2])) - np.log(1.1 * (1 + 1e-5))
    np.testing.assert_allclose(ratio, expected, rtol=1e-9)
    assert found["factored over exact, log"]["both at 1.0"]["seeds"] == 2


@pytest.mark.parametrize("scale", [0.05, 0.7, 50.0])
def test_budgets_are_tried_until_the_price_lies_between_two(scale):
    tried = []

    def point(budget):
        tried.append(budget)
        return scale * 0.01 * budget, budget**2

    # KL = price at budget = 1 / scale, between whose neighbours the value's interpolated.
    found = metric.bracketed(point, 0.01)
    below, above = sorted(tried)[:2] if scale > 1 else sorted(tried)[-2:]
    assert below < 1 / scale <= above
    share = np.log(1 / scale / below) / np.log(above / below)
    np.testing.assert_allclose(found, below**2 + share * (above**2 - below**2), rtol=1e-6)


def test_a_price_that_no_budget_reaches_has_no_number():
    assert np.isnan(metric.bracketed(lambda budget: (1e-6 * budget, 1.0), 0.01))
    assert np.isnan(metric.bracketed(lambda budget: (10 * budget, 1.0), 0.01))


def test_both_dampings_forget_at_a_price():
    record = factorize.effect("class", 0, quick=True)
    assert set(record["nll"]) == {
        "K-FADE, exact, 0.001",
        "K-FADE, factored, 0.001",
        "natural steps, exact, 0.01",
        "natural steps, factored, 0.01",
    }
    found = digits(0, epochs=2)
    before = metrics.nll(found.apply, found.params, [found.forget])
    assert all(value > before for value in record["nll"].values()), record
