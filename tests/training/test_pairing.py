"""Retain rows that come with forget rows: the loop against itself by hand, and MELU's tables."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.data import neighbor_sets, pair_by_entity, pair_in_turn
from jedit.training import TrainingMethod, Watch, unlearn
from jedit.training.rows import paired_stream, row_stream
from tests.training.scene import GRADDIFF, METHOD, apply, make_problem

ENTITIES = ["a", "a", "b", "a", "b", "c", "c"]
NEAR = (
    {"a": [0, 1, 2], "b": [3, 4], "c": [5]},
    {name: list(range(19)) for name in "abc"},
)
BESIDE = partial(pair_by_entity, ENTITIES, NEAR)


def test_the_loop_takes_the_neighbours_of_the_rows_it_takes(key, tolerance):
    params, forget, retain = make_problem()
    method = METHOD._replace(pairing=BESIDE)
    found, history = unlearn(method, apply, params, forget, retain, steps=6, key=key)
    forget_key = jax.random.split(jax.random.clone(key))[0]
    order = [
        np.asarray(jax.random.permutation(jax.random.fold_in(forget_key, e), 7)) for e in range(5)
    ]
    drawn = [(e, i) for e in range(5) for i in order[e]]
    expected, state = params, method.optimizer.init(params)
    for step in range(6):
        mine = drawn[4 * step : 4 * step + 4]
        rows = np.array([i for _, i in mine])
        others = np.concatenate([BESIDE(epoch=e)[i] for e, i in mine])
        assert len(others) == 8
        taken = (
            jax.tree.map(lambda x, i=i: x[i], batch)
            for batch, i in ((forget, rows), (retain, others))
        )
        gradient = jax.grad(lambda p, *sets: GRADDIFF(apply, p, *sets)[0])(expected, *taken)
        updates, state = method.optimizer.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
    tolerance.check(found, expected, "factorization")
    # Looks on the way change nothing.
    looked, again = unlearn(
        method, apply, params, forget, retain, steps=6, key=jax.random.clone(key),
        watch=Watch(lambda *_: False, every=2),
    )  # fmt: skip
    tolerance.check(looked, found, "factorization")
    tolerance.check(again["loss"], history["loss"], "factorization")


def test_what_goes_beside_does_not_depend_on_where_a_run_begins(key):
    given = {"num_forget": 7, "num_retain": 19}

    def beside(first, steps):
        stream = row_stream(7, first, steps, 4, key)
        return np.asarray(paired_stream(stream, first, BESIDE, **given))

    whole = beside(0, 20)
    assert whole.shape == (20, 8)
    for first, steps in ((0, 3), (5, 1), (7, 13)):
        np.testing.assert_array_equal(beside(first, steps), whole[first : first + steps])
    # Of every neighbour set in turn: each of an entity's equally often.
    first = whole.reshape(20, 4, 2)[..., 0].ravel()
    counts = np.bincount(first, minlength=6)
    assert counts[:3].max() - counts[:3].min() <= 2
    assert counts[3:5].max() - counts[3:5].min() <= 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((6, 1), int), r"must give \(7, several\) row numbers.*got \(6, 1\)"),
        (np.zeros((7, 1)), "float64"),
        (np.full((7, 2), 19), "from 0 to 18; got 19 to 19"),
        (np.full((7, 2), -1), "from 0 to 18; got -1 to -1"),
    ],
)
def test_a_table_of_anything_else_is_refused(key, table, message):
    method = METHOD._replace(pairing=lambda epoch: table)  # noqa: ARG005
    params, forget, retain = make_problem()
    with pytest.raises(ValueError, match=message):
        unlearn(method, apply, params, forget, retain, steps=1, key=key)
    with pytest.raises(ValueError, match="a pairing, of retain rows"):
        unlearn(method, apply, params, forget, None, steps=1, key=jax.random.clone(key))


def test_neighbours_share_an_attribute_and_a_general_set_is_all():
    forget = [{"entity": "x", "genre": "crime", "town": "York"}] * 2
    forget += [{"entity": "y", "genre": "verse", "town": "Bath"}]
    retain = [
        {"entity": "p", "genre": "crime", "town": "Bath"},
        {"entity": "q", "genre": "crime", "town": "Hove"},
        {"entity": "r", "genre": "essay", "town": "Bath"},
    ]
    genre, town, general = neighbor_sets(forget, retain)
    # Nobody writes verse, nobody lives in York: then all will do.
    assert genre == {"x": [0, 1], "y": [0, 1, 2]}
    assert town == {"x": [0, 1, 2], "y": [0, 2]}
    assert general == {"x": [0, 1, 2], "y": [0, 1, 2]}
    table = pair_by_entity(["x", "x", "y"], (genre, town, general), epoch=0)
    np.testing.assert_array_equal(table, [[0, 0, 0], [1, 1, 1], [2, 0, 2]])
    with pytest.raises(ValueError, match=r"expected the attributes \['entity', 'genre', 'town'\]"):
        neighbor_sets(forget, [{"entity": "p", "genre": "crime"}])


def test_a_pairing_of_one_row_is_one_to_one(key):
    """In turn, every retain row is seen once before any comes again."""
    seen = []

    def objective(apply, params, forget, retain, reference):
        del apply, forget, reference
        return jnp.sum(params["w"]) * 0, {"rows": jnp.sum(retain.inputs)}

    method = TrainingMethod(
        objective, optax.sgd(1.0), batch_size=3, pairing=partial(pair_in_turn, 6, 12)
    )
    rows = lambda n: Batch(jnp.exp2(jnp.arange(n, dtype=float)))  # noqa: E731
    params = {"w": jnp.zeros(2)}
    _, history = unlearn(method, lambda p, x: x, params, rows(6), rows(12), steps=4, key=key)  # noqa: ARG005
    seen = np.asarray(history["rows"], int)
    assert seen.sum() == 2**12 - 1
    assert np.bitwise_or.reduce(seen) == 2**12 - 1


def test_an_entity_meets_all_of_a_large_set_and_begins_elsewhere_than_the_others():
    entities = ["a"] * 4 + ["b"] * 3
    general = {name: list(range(19)) for name in "ab"}
    tables = [pair_by_entity(entities, (general,), epoch=e)[:, 0] for e in range(7)]
    assert not set(tables[0][:4]) & set(tables[0][4:])
    for part in (slice(0, 4), slice(4, 7)):
        met = np.concatenate([table[part] for table in tables])
        counts = np.bincount(met, minlength=19)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1
