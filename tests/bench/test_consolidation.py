"""The script of consolidation, on a toy; and what its learners keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.recipes.learners import KeepRows
from tests.bench.claims import consolidation, nmda


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_every_learner_is_tuned_and_measured_on_both_streams(tmp_path, monkeypatch, capsys):
    # Permutations and noise differ from turns by a word.
    scenes = ["--scenes", "class", "rotation"]
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path), *scenes]
    consolidation.main(arguments)
    shown = capsys.readouterr().out
    names = consolidation.ways(consolidation.QUICK, "class")
    assert all(shown.count(f"| {name} |") == 2 for name in names)
    assert shown.count("5 min-ACC, null space - replay") == 2
    assert (tmp_path / "consolidation.png").stat().st_size > 10_000

    def unread(*_):
        raise AssertionError("a seed that was measured was measured again")

    monkeypatch.setattr(consolidation, "measured", unread)
    monkeypatch.setattr(consolidation, "tuned", unread)
    consolidation.main(arguments)


def test_a_part_of_mnist_is_learnt_under_noise(shared_data, tmp_path, capsys):
    chosen = ["--scenes", "noise", "--learners", "naive", "null space", "replay"]
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path), *chosen]
    consolidation.main([*arguments, "--mnist", str(shared_data / "mnist")])
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in ("naive", "null space", "replay"))
    assert "| joint |" not in shown
    assert "6 min-ACC" not in shown
    assert "5 min-ACC, null space - replay" in shown
    assert (tmp_path / "mnist/consolidation.json").exists()


def test_each_seed_draws_other_images_of_mnist(shared_data):
    size, folder = consolidation.QUICK._replace(rows=(30, 20)), shared_data / "mnist"
    (one, test), (other, _) = (consolidation.images(size, folder, seed) for seed in (0, 1))
    assert (len(one.labels), len(test.labels)) == (30, 20)
    assert not np.array_equal(one.images, other.images)


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [(0.2, 0.1, "held"), (0.1, 0.2, "not decided here"), (-0.2, 0.1, "did not hold")]
    + [(0.0, 0.0, "did not hold")],
)
def test_a_verdict_is_about_a_difference_above_zero(mean, half, said):
    assert consolidation.verdict({"mean": mean, "half_width": half}) == said


def test_rows_of_all_tasks_are_kept_in_equal_number():
    """Of one size whatever the number of tasks, each row one of its task."""
    keep, kept = KeepRows(7), None
    for task in range(3):
        labels = jnp.full(6, task, jnp.int32)
        batch = Batch(100 * labels + jnp.arange(6), labels)
        kept = keep(len, {}, batch, kept, key=jax.random.key(task))
        assert len(kept.rows.targets) == 7
        counts = np.bincount(np.asarray(kept.rows.targets), minlength=3)
        assert max(counts[: task + 1]) - min(counts[: task + 1]) <= 1
        assert np.array_equal(np.asarray(kept.rows.inputs) // 100, kept.rows.targets)
    whole = KeepRows(None)
    first = whole(len, {}, batch, None, key=jax.random.key(0))
    both = whole(len, {}, batch, first, key=jax.random.key(1))
    assert np.array_equal(np.sort(both.rows.inputs), np.repeat(batch.inputs, 2))


def test_activations_are_compared_by_the_same_edit(tmp_path, capsys):
    nmda.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert all(f"| K-FADE, {name} | " in shown for name in nmda.ACTIVATIONS)
    assert shown.count("less GELU, rise") == 2
