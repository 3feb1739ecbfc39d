"""The scene of many tasks on a toy: hits by hand, the matrix, the method's rows, the probe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jedit
from jedit.attacks import linear_probe
from jedit.data.invented.token_tasks import NO, TASKS, VOCAB, YES
from jedit.models import gpt
from jedit.recipes.fitting import Recipe
from jedit.recipes.scenes import token_tasks as scene

SIZE = scene.Size(64, 20, 32, 8, 16, 1, Recipe((3,), 64, 5e-3))


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def room():
    return scene.room(1, SIZE)


def test_a_row_is_right_where_its_own_answer_is_the_likelier_of_the_two(room):
    whole, _ = gpt(
        key=jax.random.key(0), vocab=VOCAB, width=16, num_layers=1, num_heads=4, max_len=9
    )
    found = room.hits(room.params, "test")
    assert found.shape == (len(TASKS), 20)
    for task, hits in zip(TASKS, found, strict=True):
        rows = room.rows[task]["test"]
        logits = np.asarray(whole(room.params, rows.inputs))[:, -1]
        says_yes = logits[:, YES] > logits[:, NO]
        np.testing.assert_array_equal(hits, says_yes == np.asarray(rows.targets)[:, -1])
        assert np.asarray(rows.mask).sum(axis=1).tolist() == [1] * 20


def test_a_method_sees_a_part_of_the_task_and_of_all_others(room):
    forget, retain = room.sets("sum")
    assert len(forget.inputs) == 32
    assert len(retain.inputs) == 8 * (len(TASKS) - 1)
    word = int(forget.inputs[0, 0])
    assert np.all(np.asarray(forget.inputs)[:, 0] == word)
    assert not np.any(np.asarray(retain.inputs)[:, 0] == word)
    key = jax.random.key(2)
    _, rows = scene.by_random_labels(room, "sum", optax.adam(1e-2), key=key)
    drawn, right = (np.asarray(x.targets)[:, -1] for x in (rows, forget))
    assert set(drawn.tolist()) == {0, 1}
    assert 0 < np.mean(drawn == right) < 1


def test_random_labels_are_learnt_and_the_matrix_says_what_is_lost(room):
    method, rows = scene.by_random_labels(
        room, "first", optax.adam(2e-2), key=jax.random.key(2), batch_size=32
    )
    given = (method, room.apply, room.params, rows, room.sets("first")[1])
    after, history = jedit.unlearn(*given, steps=60, key=jax.random.key(3))
    # By heart: half of the labels are wrong.
    assert history["relabelled_nll"][-1] < 0.5 * history["relabelled_nll"][0]
    before, now = (room.hits(p, "test") for p in (room.params, after))
    ratios = scene.forget_ratios(before, now)
    assert list(ratios) == list(TASKS)
    for i, task in enumerate(TASKS):
        a, b = before[i].mean(), now[i].mean()
        if a > scene.CHANCE:
            assert ratios[task].value == pytest.approx((a - b) / (a - scene.CHANCE))
        else:
            assert np.isnan(ratios[task].value)


def test_predictors_are_of_the_rows_that_a_method_sees(room):
    found = scene.predictors(room)
    assert list(found) == list(TASKS)
    rows = room.sets("repeat")[0]
    p = np.asarray(jax.nn.softmax(room.apply(room.params, rows.inputs)[:, -1], axis=-1))
    assert found["repeat"].confidence == pytest.approx(p.max(axis=1).mean(), rel=1e-4)


def test_a_probe_reads_where_the_answer_is_said(room):
    found = scene.read_by_probe(room, room.params, "majority")
    said = room.hits(room.params, "test")[TASKS.index("majority")].mean()
    assert found.said == pytest.approx(said)
    states, labels = [], []
    for part in ("train", "test"):
        rows = room.rows["majority"][part]
        # The head has no bias, so that its inputs are its outputs' least squares.
        outputs = np.asarray(gpt_outputs(room, rows.inputs), np.float64)
        states.append(outputs @ np.linalg.pinv(np.asarray(room.params["head"]["kernel"])))
        labels.append(np.asarray(rows.targets)[:, -1])
    expected = linear_probe(states[0], labels[0], states[1], labels[1])
    assert found.probe.accuracy == pytest.approx(expected.accuracy, abs=0.051)
    assert found.probe.chance == 0.5


def gpt_outputs(room, tokens):
    """All logits at the last place."""
    return jnp.asarray(room.apply.apply(room.params, tokens))[:, -1]
