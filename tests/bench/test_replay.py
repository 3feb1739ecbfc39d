"""The script of replay, on a toy; what it keeps; and the stream of authors that it asks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.data import decode_answers
from jedit.recipes.learners import KeepGeneral
from jedit.recipes.scenes.author_stream import asks, author_stream, in_views, remembered
from jedit.recipes.scenes.question_answer import Model
from tests.bench.claims import replay


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_methods_are_chosen_on_seeds_that_are_not_reported(tmp_path, capsys):
    """Every method of both scenes is tuned and run, and nothing is measured twice."""
    arguments = ["--quick", "--seeds", "1", "--author-seeds", "1", "--out", str(tmp_path)]
    replay.main([*arguments, "--only", "digits", "authors"])
    shown = capsys.readouterr().out
    for grids in (replay.DIGIT_GRIDS, replay.AUTHOR_GRIDS):
        assert all(f"| {name} | " in shown for name in grids)
    seeds = {path.stem.rsplit("-", 1)[1] for path in tmp_path.rglob("replay/*/*.json")}
    assert seeds == {"0", "100"}


def test_general_rows_are_of_the_first_task_alone():
    keep, kept = KeepGeneral(5), None
    for task in range(2):
        batch = Batch(10 * task + jnp.arange(3), jnp.full(3, task, jnp.int32))
        kept = keep(len, {}, batch, kept, key=jax.random.key(task))
        assert kept.rows.targets.tolist() == [0] * 5
        # Three rows for five places: each is there, two of them twice.
        assert sorted(np.bincount(kept.rows.inputs)) == [1, 2, 2]


def test_a_row_is_remembered_by_its_keyword_in_all_wordings():
    """A model that says the targets remembers all; views are the same rows in other words."""
    small = Model(8, 1, 2, 300, 64)
    stream = author_stream(seed=0, num_parts=2, authors_per_part=1, facts_per_author=4, model=small)
    test = stream.tests[0]
    size = stream.tokenizer.get_vocab_size()
    said = lambda params, _: params["gain"] * jax.nn.one_hot(test.targets, size)  # noqa: E731
    scores = remembered(said, [test])
    assert scores({"gain": jnp.ones(())}).tolist() == [1.0]
    assert scores({"gain": -jnp.ones(())}).tolist() == [0.0]
    known = np.asarray(test.mask).sum(1)
    assert np.all((known > 0) & (known <= np.asarray(stream.tasks[0].mask).sum(1)))
    views = in_views(stream, 0)
    assert views.rows.inputs.shape[:2] == (4, 4)
    texts = [decode_answers(stream.tokenizer, np.asarray(view)) for view in views.rows.inputs]
    assert all(len(set(wordings)) > 1 for wordings in texts)


def test_an_answer_earns_its_keyword():
    """What is played are answers in groups, each with a reward of 0 or 1."""
    stream = author_stream(
        seed=0, num_parts=2, authors_per_part=2, facts_per_author=4, model=Model(8, 1, 2, 300, 64)
    )
    played = asks(stream, 1, questions=3, group=2)(stream.params, key=jax.random.key(0))
    assert played.rewards.shape == (3, 2)
    assert len(played.rows.inputs) == 6
    said = decode_answers(stream.tokenizer, np.asarray(played.rows.targets))
    known = [str(row.fields["value"]).lower() for row in stream.parts[1]]
    for reward, text in zip(played.rewards.reshape(-1), said, strict=True):
        assert reward in (0, 1)
        assert not reward or any(value in text.lower() for value in known)
