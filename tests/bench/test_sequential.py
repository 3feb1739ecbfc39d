"""The claim of sequential edits runs from end to end at toy size, and counts right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.edits import Edit
from jedit.methods import AssociationInfo, KeyState
from tests.bench.claims import sequential
from tests.bench.claims.sequential import EARLIER, Setting, Size

pytestmark = pytest.mark.usefixtures("standard_promotion", "rank_promotion")

TOY = Size(objects=4, edited=12, kept=8, unseen=4, width=16, epochs=60, batch=4, every=1)
SETTINGS = (
    Setting("AlphaEdit", 0.05, 0.1),
    Setting("MEMIT", 3.0, 1e-2),
    Setting(EARLIER, 3.0, 1e-2),
)


def test_a_world_is_what_it_says():
    world = sequential.make_world(TOY, 0)
    assert np.all(world.edited.objects != world.wanted.objects)
    np.testing.assert_array_equal(world.edited.prompts, world.wanted.prompts)
    at = sequential.SUBJECT
    subjects = [np.asarray(facts.prompts)[:, at] for facts in world[:-1]]
    np.testing.assert_array_equal(subjects[0], subjects[2])  # the same subject, another relation
    assert not np.any(subjects[3][:, None] == subjects[0][None])
    assert not np.any(subjects[4][:, None] == np.concatenate(subjects[:4])[None])
    relations = [np.asarray(facts.prompts)[:, 1 - at] for facts in world[:-1]]
    assert np.all(relations[0] != relations[2])
    assert len(subjects[3]) == 16
    assert max(int(facts.objects.max()) for facts in world[:-1]) < world.vocab
    # An object's token tells its relation.
    for facts, relation in zip(world[:-1], relations, strict=True):
        block = (np.asarray(facts.objects) - (world.vocab - 2 * TOY.objects)) // TOY.objects
        np.testing.assert_array_equal(block, relation - relation.min())


def test_it_runs_and_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(sequential, "Size", lambda: TOY)
    monkeypatch.setattr(sequential, "CHOSEN", SETTINGS)
    found = [sequential.run_seed(0, TOY, SETTINGS)]
    assert found[0]["before"]["edited"] > 0.5
    for curves in found[0]["curves"].values():
        np.testing.assert_array_equal(curves.edits, [4, 8, 12])
        assert curves.by_batch.mean() == pytest.approx(curves.survived[-1])
        assert curves.by_batch[-1] == curves.latest[-1]
        assert curves.latest[0] == curves.survived[0]
    assert found[0]["curves"][SETTINGS[0]].latest[0] > 0.4
    summary = sequential.summarise(found * 2, SETTINGS)
    assert [len(m["survived"]) for m in summary["methods"].values()] == [3] * 3
    text = sequential.table(summary)
    assert len(text.splitlines()) == 5
    sequential.save_png(sequential.figure(summary), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_an_edit_of_nothing_writes_nothing_and_keeps_all():
    world = sequential.make_world(TOY, 1)
    apply, params = sequential.learn(world, TOY, jax.random.key(0))

    def nothing(params, facts, targets, state):
        del params, facts, targets, state
        return Edit({}), AssociationInfo(jnp.zeros((2, 4)), {}, KeyState({}, jnp.zeros((), int)))

    found = sequential.run_sequence(apply, params, world, TOY, nothing)
    right = np.asarray(sequential._is_right(apply, params, world.wanted))
    np.testing.assert_allclose(found.survived, [right[:4].mean(), right[:8].mean(), right.mean()])
    np.testing.assert_allclose(
        found.latest, [right[:4].mean(), right[4:8].mean(), right[8:].mean()]
    )
    kept = sequential._is_right(apply, params, world.kept).mean()
    np.testing.assert_allclose(found.kept, [kept] * 3)
