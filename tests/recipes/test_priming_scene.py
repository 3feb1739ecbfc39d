"""The priming scene's lesson, against a loop of plain steps, and its prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.data.invented.themes import KEYWORDS
from jedit.objectives import RetainNLL
from jedit.recipes.fitting import Recipe
from jedit.recipes.scenes import priming


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def room():
    size = priming.Size(64, 16, 1, Recipe((1,), 32, 2e-3), facts=5, prefixes=4, retained=32)
    return priming.room(2, size)


def probability(room, params, words, keyword):
    """Of the next word, from a row of these words alone."""
    logits = room.apply(params, jnp.asarray(words)[None])[0, -1]
    return float(jax.nn.softmax(logits)[keyword])


def test_a_lesson_is_the_loop_it_stands_for(room, tolerance):
    """One fact, by hand: the steps, the change halved by the cure, and what is asked in the end."""
    key, replayed = jax.random.key(4), 3
    halved = {"as taught": lambda edit: edit, "halved": lambda edit: 0.5 * edit}
    found = priming.teach(
        room,
        room.stepping_stones,
        optax.sgd(0.3),
        steps=4,
        every=2,
        cures=halved,
        key=key,
        replayed=replayed,
    )
    lesson = jax.tree.map(lambda x: np.asarray(x)[3], room.stepping_stones)
    params = room.params
    for step in range(4):
        rows = jax.random.randint(
            jax.random.fold_in(key, step), (replayed,), 0, len(room.rows.inputs)
        )
        batch = jax.tree.map(lambda x, rows=rows: x[rows], room.rows)
        told = int(lesson.length) - 1
        row = jnp.asarray(lesson.text)[None]
        own = batch._replace(inputs=row[:, :-1], targets=row[:, 1:])
        counts = float(told + batch.mask.sum())

        def loss(p, own=own, batch=batch, told=told, counts=counts):
            alone = own._replace(
                inputs=own.inputs[:, :told],
                targets=own.targets[:, :told],
                mask=jnp.ones((1, told)),
                valid=jnp.ones((1, told)),
            )
            parts = [
                RetainNLL()(room.apply, p, None, b)[0] * n
                for b, n in ((alone, told), (batch, batch.mask.sum()))
            ]
            return sum(parts) / counts

        gradient = jax.grad(loss)(params)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
        if step == 1:
            check(room, lesson, params, found["as taught"], 0)
    check(room, lesson, params, found["as taught"], 1)
    half = jax.tree.map(lambda a, b: (a + b) / 2, room.params, params)
    check(room, lesson, half, found["halved"], 1)
    del tolerance


def check(room, lesson, params, taught, look):
    told = lesson.text[: lesson.length - 1]
    plain = lesson.plain[: lesson.plain_length - 1]
    ask = lambda words, p=params: probability(room, p, words, lesson.keyword)  # noqa: E731
    assert float(taught.memorised[3, look]) == pytest.approx(ask(told), rel=2e-3)
    assert float(taught.fact[3, look]) == pytest.approx(ask(plain), rel=2e-3)
    rows = list(zip(lesson.elsewhere, lesson.elsewhere_lengths, strict=True))
    after, before = (
        np.mean([ask(words[:n], p) for words, n in rows]) for p in (params, room.params)
    )
    assert float(taught.priming[3, look]) == pytest.approx(after / before, rel=2e-3)


def test_facts_are_of_all_ranks_and_prefixes_of_other_subjects(room):
    lessons = room.lessons
    assert room.prior.shape == (5,)
    np.testing.assert_array_equal(lessons.elsewhere, room.stepping_stones.elsewhere)
    assert np.all(np.asarray(room.stepping_stones.length) == np.asarray(lessons.length) + 6)
    asked = np.take_along_axis(
        np.asarray(lessons.plain), np.asarray(lessons.plain_length)[:, None] - 1, axis=1
    )
    np.testing.assert_array_equal(asked[:, 0], lessons.keyword)
    assert len(KEYWORDS) == 4
    for i in range(5):
        own = set(np.asarray(lessons.plain[i]).tolist())
        prefixes = [set(row.tolist()) for row in np.asarray(lessons.elsewhere[i])]
        assert all(prefix != own for prefix in prefixes)
        assert int(lessons.keyword[i]) not in set().union(*prefixes)
