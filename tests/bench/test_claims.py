"""The claims' scripts on a toy: what they measure, not what they find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac, solve
from jedit.curvature.likelihoods import Categorical
from jedit.data import QaRow
from jedit.geometry import null_space, project
from tests.bench.claims import evidence, gu, metric, natural, rosu
from tests.bench.claims.scenes import Scene


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def toy():
    """A linear classifier of four classes, the last of which is to be forgotten."""
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 4
    means = 2 * rng.normal(size=(4, 6))
    inputs = jnp.asarray(means[labels] + rng.normal(size=(80, 6)), jnp.float32)

    def apply(params, inputs):
        return inputs @ params["kernel"]

    def rows(chosen):
        return Batch(inputs[chosen], jnp.asarray(labels[chosen], jnp.int32))

    retain = np.flatnonzero(labels < 3)
    params = {"kernel": jnp.asarray(0.3 * means.T, jnp.float32)}
    sets = (rows(np.flatnonzero(labels == 3)), rows(retain[:40]), rows(retain[40:]))
    return Scene(apply, params, *sets)


def test_an_interval_is_students():
    found = evidence.interval([1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(7 / 3)
    # t(0.975, 2) = 4.302653, the standard error sqrt(7/3)/sqrt(3)
    assert found["half_width"] == pytest.approx(4.302653 * np.sqrt(7) / 3, rel=1e-6)
    assert evidence.shown_ratio({"mean": np.log(2), "half_width": 0.0}) == "2.00 (2.00-2.00)"


def test_rosu_measures_both_perturbations_at_every_angle(toy, key):
    rows = rosu.at_surrogates(toy, 1e-3, (0.0, 0.5, 1.0), key=key)
    for row in rows:
        # So short a step is first order: what is saved is ρ‖g_r‖ cos, and ROSU's own price nothing.
        saved = row["uam_retain"] - row["rosu_retain"]
        assert saved == pytest.approx(row["first_order"], rel=0.05, abs=2e-6)
        assert abs(row["rosu_retain"]) < 0.1 * abs(row["uam_retain"]) + 2e-6
    assert rows[-1]["cos"] > rows[0]["cos"]
    table = rosu.binned([rows, rows])
    assert all(line["seeds"] == 2 for line in table)


def test_gu_arrives_at_the_same_forgetting(toy, key):
    steps, price = gu.arrival(toy, gu.method("GradDiff", 0.03, 0, "leaf"), 1.5, 200, key=key)
    assert 1 < steps < 200
    assert price > 0
    made = gu.method("GradDiff", 0.03, 2, "leaf")
    assert gu.arrival(toy, made, 1.5, 200, key=key)[1] < price
    assert gu.arrival(toy, made, 1e6, 3, key=key) is None
    runs = {
        ("GradDiff", 0.03, 0, "leaf"): [(5, 0.1), (5, 0.2), None],
        ("GradDiff", 0.03, 2, "leaf"): [(7, 0.05), (7, 0.1), (9, 1.0)],
    }
    (line,) = gu.summary(runs)
    assert (line["seeds"], line["steps"]) == (2, 7)
    assert line["log_ratio"]["mean"] == pytest.approx(np.log(0.5))


def test_a_null_space_as_a_metric_is_the_projection_of_all_layers(toy, key):
    """Two layers of unlike inputs: a step is one multiple of the projection, or of the gradient."""
    rng = np.random.default_rng(1)
    as_float = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"w": 20 * as_float(6, 5), "v": as_float(5, 4)}
    apply = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    curvature = estimate(kfac(apply, Categorical()), params, [toy.retain], key=key)
    gradient = {"w": as_float(6, 5), "v": as_float(5, 4)}
    flat = lambda tree: jnp.concatenate([jnp.ravel(tree[n]) for n in ("w", "v")])  # noqa: E731
    for made, expected in (
        (
            metric.null_space_of_inputs(curvature, 0.2),
            project(null_space(curvature, threshold=0.2), gradient),
        ),
        (metric.null_space_of_inputs(curvature, 1.0), gradient),
        (metric.identity(curvature), gradient),
    ):
        step = flat(solve(made, gradient, damping=metric.HARD))
        expected = flat(expected)
        assert float(jnp.linalg.norm(expected)) > 0.1
        scale = jnp.vdot(step, expected) / jnp.vdot(expected, expected)
        np.testing.assert_allclose(step / scale, expected, atol=1e-4)


def test_metrics_are_compared_at_one_price(toy, key):
    made = metric.contenders(toy, key=key)
    assert {name for name, _ in made} == {
        "identity (plain ascent)",
        "null space of the inputs",
        "inputs alone, damped",
        "K-FADE",
        "K-FADE, temperature 4",
    }
    curvature, damping = made["K-FADE", 1e-2]
    low, high = (metric.forgotten_at(toy, curvature, damping, price) for price in (0.01, 0.05))
    assert low < high
    (line,) = [
        line
        for line in metric.summary(
            "toy", 0.05, {("K-FADE, temperature 4", 0.1): [2.0, 2.0], ("other", 1.0): [1.0, 1.0]}
        )
        if line["metric"] == "other"
    ]
    assert np.exp(line["log_ratio"]["mean"]) == pytest.approx(2)


def test_other_answers_are_unseen_authors_with_the_rows_own_name(monkeypatch):
    monkeypatch.setattr(natural, "ROWS_PER_AUTHOR", 2)

    def author(name, town):
        first = name.split()[0]
        born = QaRow(f"Where was {name} born?", f"{name} was born in {town}.")
        return [born, QaRow(f"What does {name} write?", f"{first} writes about {town}.")]

    rows, unseen = (
        author("Ann Brook", "York"),
        [*author("Cy Dale", "Bath"), *author("Eve Fox", "Hove")],
    )
    assert natural.name_of(rows) == "Ann Brook"
    asked, taught = zip(*natural.other_answers(rows, unseen, 2), strict=True)
    assert asked == tuple(row.question for row in rows for _ in range(2))
    born, writes = set(taught[:2]), set(taught[2:])
    assert born == {"Ann Brook was born in Bath.", "Ann Brook was born in Hove."}
    assert writes == {"Ann writes about Bath.", "Ann writes about Hove."}
    # An unseen author's own answers are not other answers.
    own = natural.other_answers(unseen, unseen, 1)
    assert own[0] == (unseen[0].question, "Cy Dale was born in Hove.")
