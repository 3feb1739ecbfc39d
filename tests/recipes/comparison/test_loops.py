"""The two loops of the recipes, and the sets of the scenes."""

import functools

import jax
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.data import QaRow
from jedit.methods.row import ADAM
from jedit.recipes.comparison import trajectories as ascent
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.scenes import authors as authors_scene
from jedit.recipes.scenes import question_answer
from jedit.recipes.scenes.authors import authors
from jedit.training import TrainingMethod


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def quadratic(apply, params, forget, retain, reference):
    """Forget rows pull one parameter up, retain rows hold the other where it was."""
    del apply
    up = -params["a"] * forget.targets.mean()
    hold = (params["b"] - reference["b"]) ** 2 * retain.targets.mean()
    return up + hold, {}


def by_adam(objective):
    return TrainingMethod(objective, ADAM, batch_size=2)


def nothing(*_):
    raise AssertionError("the objective does without")


@pytest.fixture
def start():
    return {"a": jax.numpy.zeros(()), "b": jax.numpy.ones(())}


@pytest.fixture
def rows():
    return Batch(np.ones((5, 1)), np.ones(5))


def test_a_longer_ascent_passes_through_the_shorter_one(start, rows, key):
    run = functools.partial(
        ascent.ascend,
        by_adam(quadratic),
        nothing,
        start,
        rows,
        rows,
        learning_rates=(0.1,),
        key=key,
    )
    ((*looked,),) = run(looks=(3, 10))
    long = {steps: p for steps, _, p in looked}
    # Looks a step apart, as above: the same program, whose numbers are the same to the bit.
    ((_, (_, _, short)),) = run(looks=(2, 3))
    assert long[3] == short
    # Adam on a constant gradient moves by the learning rate a step.
    assert float(long[10]["a"]) == pytest.approx(1.0, rel=1e-4)
    assert float(long[10]["b"]) == 1.0


def test_a_grid_of_learning_rates_compiles_once(start, rows, key):
    traced = []

    def counted(*arguments):
        traced.append(1)
        return quadratic(*arguments)

    method = by_adam(counted)
    rates = (0.1, 0.2, 0.3)
    found = ascent.ascend(
        method, nothing, start, rows, rows, learning_rates=rates, looks=(2,), key=key
    )
    moved = [float(params["a"]) for ((_, _, params),) in found]
    assert len(traced) == 1
    assert moved == pytest.approx([2 * rate for rate in rates], rel=1e-4)


def test_a_rate_that_destroys_the_model_leaves_no_numbers(start, rows, key):
    run = functools.partial(ascent.ascend, by_adam(quadratic), nothing, start, rows, rows, key=key)
    good, bad = run(learning_rates=(0.1, np.inf), looks=(2, 4))
    assert [steps for steps, *_ in bad] == [2, 4]
    assert all(np.isnan(leaf).all() for *_, p in bad for leaf in jax.tree.leaves(p))
    assert all(np.isfinite(leaf).all() for *_, p in good for leaf in jax.tree.leaves(p))


def one_hot_classifier(params, inputs):
    return inputs @ params


def test_training_sees_every_row_and_a_shorter_one_is_a_part_of_it(key):
    inputs = np.eye(4, dtype=np.float32)
    targets = np.array([0, 1, 0, 1])
    params = jax.numpy.zeros((4, 2), inputs.dtype)
    run = functools.partial(train, one_hot_classifier, params, Batch(inputs, targets), key=key)
    short, long = run(Recipe((60, 200), 2, 0.05))
    assert (short.epochs, long.epochs) == (60, 200)
    assert short.seconds < long.seconds
    assert ((inputs @ np.asarray(long.params)).argmax(axis=1) == targets).all()
    assert np.abs(long.params).min() > 1  # no row was left out
    (alone,) = run(Recipe((60,), 2, 0.05))
    np.testing.assert_array_equal(alone.params, short.params)
    (other,) = train(
        one_hot_classifier,
        params,
        Batch(inputs, targets),
        Recipe((60,), 2, 0.05),
        key=jax.random.key(0),
    )
    assert np.abs(np.asarray(other.params) - alone.params).max() > 0


def test_the_authors_scene_forgets_whole_authors(monkeypatch):
    calls = []
    monkeypatch.setattr(
        authors_scene, "question_answer", lambda rows, *_, **__: calls.append(rows) or ()
    )
    for seed in (3, 3, 4):
        authors(seed=seed, say=print, num_authors=6, facts_per_author=5, num_forgotten=2)
    data, forget, retain, unseen = calls[0]
    assert (len(data), len(forget), len(retain), len(unseen)) == (30, 10, 20, 10)
    known = {row.fields["author"] for row in data}
    assert known.isdisjoint(row.fields["author"] for row in unseen)
    assert len({row.fields["author"] for row in forget}) == 2
    assert {row.fields["author"] for row in forget}.isdisjoint(
        row.fields["author"] for row in retain
    )
    assert all(row.paraphrased_answer and len(row.perturbed_answer) == 5 for row in forget)
    assert calls[1] == calls[0]
    assert calls[2] != calls[0]


def test_held_out_rows_are_seen_by_no_edit_and_forgotten_rows_by_no_retraining():
    rows = [QaRow(f"Question {i}?", f"Answer {i}.") for i in range(20)]
    selection = question_answer.Selection(rows, rows[:4], rows[6:])
    sets = question_answer._split(selection, key=jax.random.key(0))
    assert len(sets.kept) == 16
    assert not set(sets.kept) & set(sets.forget)
    assert not set(sets.seen) & set(sets.heldout)
    assert set(sets.seen) | set(sets.heldout) == set(rows[6:])
    assert len(sets.seen) == 10
    again = question_answer._split(selection, key=jax.random.key(0))
    assert again == sets
    assert question_answer._split(selection, key=jax.random.key(1)) != sets
