"""The vision protocol on the embedded digits at toy size: every row there, in its right place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.data import forget_class, load_digits, split_digits
from jedit.metrics import UnlearningScores, accuracy, average_gap, membership_scores
from jedit.recipes.fitting import Recipe
from tests.bench.vision_protocol.vision import (
    Method,
    Protocol,
    fit_model,
    forget_random,
    judge,
    make_task,
    tune,
    unlearn_and_judge,
)
from tests.bench.vision_protocol.vision_methods import METHODS

pytest.importorskip("sklearn")

GRID = 4
PROTOCOL = Protocol(
    Recipe((10,), 64, 1e-2), epochs=0.5, batch_size=64, probe_rows=100, judged_rows=300, chunk=200
)


def network(params, images):
    """One hidden layer: what of the protocol there is to test needs no convolution."""
    x = images.reshape(len(images), -1)
    return jax.nn.relu(x @ params["w"] + params["b"][None]) @ params["v"]


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax mixes, its counter and its rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def scene():
    """A class to forget, the original model and the retrained one."""
    rows, test = split_digits(load_digits(), seed=0)
    rng = np.random.default_rng(0)
    initial = {"w": rng.normal(size=(64, 16)) / 8, "b": np.zeros(16), "v": np.zeros((16, 10))}
    initial = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), initial)
    parts = forget_class(rows, 3)

    def fit(some):
        return fit_model(network, initial, some, PROTOCOL, key=jax.random.key(1))

    original, _ = fit(rows)
    task = make_task(network, original, rows, parts, test, PROTOCOL, seed=0)
    return task, fit(rows.take(parts[1])), rows, test


@pytest.fixture(scope="module")
def rows_found(scene):
    task, retrained, _, _ = scene
    chosen = [(name, method, method.grid[-1]) for name, method in METHODS.items()]
    return unlearn_and_judge(task, retrained, chosen, PROTOCOL, key=jax.random.key(2))


def test_every_row_is_there_with_its_seconds(rows_found):
    assert list(rows_found) == ["retrained", "untouched", *METHODS]
    assert len(METHODS) == 10
    assert all(len(method.grid) == GRID for method in METHODS.values())
    for name, row in rows_found.items():
        assert all(0 <= share <= 1 for share in row.scores), name
        assert (row.seconds > 0) == (name != "untouched")


def test_a_class_never_seen_is_not_known(rows_found):
    retrained, untouched = (rows_found[name].scores for name in ("retrained", "untouched"))
    assert average_gap(retrained, retrained) == 0
    assert retrained.unlearning_accuracy == 1
    assert retrained.membership_efficacy > 0.9
    assert untouched.unlearning_accuracy < 0.3
    assert average_gap(untouched, retrained) > 30


def test_methods_that_raise_the_forget_loss_forget(rows_found):
    before = rows_found["untouched"].scores.unlearning_accuracy
    for name in ("gradient ascent", "random label", "SalUn", "GU", "engram", "K-FADE"):
        assert rows_found[name].scores.unlearning_accuracy > before, name


def test_scores_are_those_of_the_metrics(scene, rows_found):
    task, (params, _), rows, test = scene
    found = rows_found["retrained"]
    kept = test.take(np.flatnonzero(test.labels != 3)).as_batch()
    assert found.scores.test_accuracy == pytest.approx(accuracy(task.apply, params, kept))
    assert found.scores.unlearning_accuracy == 1 - accuracy(task.apply, params, task.forget)
    assert sum(int(b.valid.sum()) for b in task.judged["retain"]) == PROTOCOL.judged_rows
    confidence = membership_scores(task.apply, params, task.forget)
    share = np.mean(confidence < found.attack.threshold)
    assert found.scores.membership_efficacy == pytest.approx(share, abs=1e-3)
    assert len(task.forget.inputs) + len(task.retain.inputs) == len(rows.labels)


def test_a_random_part_is_of_the_stated_size_and_depends_on_the_seed(scene):
    _, _, rows, _ = scene
    forget, retain = forget_random(rows, 0.1, seed=4)
    assert len(forget) == round(0.1 * len(rows.labels))
    np.testing.assert_array_equal(
        np.sort(np.concatenate([forget, retain])), np.arange(len(rows.labels))
    )
    np.testing.assert_array_equal(forget, forget_random(rows, 0.1, seed=4)[0])
    assert np.any(forget != forget_random(rows, 0.1, seed=5)[0])


def test_tuning_takes_the_setting_nearest_to_retrained(scene):
    """A method whose setting is how much of the way to the retrained model it goes."""
    task, retrained, _, _ = scene

    def go(task, protocol, setting, key):
        del protocol, key
        far = setting["far"]
        params = jax.tree.map(lambda a, b: a + far * (b - a), task.params, retrained[0])
        return params, 1.0

    method = Method(go, tuple({"far": far} for far in (0.0, 1.0, 5.0)))
    key = jax.random.key(3)
    best, gaps = tune(task, judge(task, *retrained), method, PROTOCOL, key=key)
    assert best == {"far": 1.0}
    assert gaps[1] < 0.5 < min(gaps[0], gaps[2])


def test_a_model_that_has_run_away_is_judged(scene):
    task = scene[0]
    broken = jax.tree.map(lambda p: p * np.nan, task.params)
    scores = judge(task, broken, 0.0).scores
    assert scores.membership_efficacy == 0
    assert scores == UnlearningScores(*map(float, np.nan_to_num(scores, nan=-1)))
