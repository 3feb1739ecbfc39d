"""`forget` with a checkpoint: broken off anywhere, it ends as the unbroken call does."""

import jax
import numpy as np
import pytest

import jedit
from jedit.core.batch import Batch
from jedit.objectives import FIT, GradedRows
from jedit.requests.forget import forget
from jedit.requests.forgetting import Forgetting, Natural, Recovery, Rewind, Watching
from jedit.requests.walk import Look, _bits_of, _looks_of
from tests.requests.test_forget import ADAM, KEY, apply, scene  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Stopped(Exception):
    pass


def run(scene, folder, **changed):  # noqa: F811
    """A rewind, natural steps and a recovery, with saves in between."""
    params, gone, kept, unseen = scene
    start = jax.tree.map(lambda x: 0.2 * x, params)
    steps = Natural(
        select="^shared$",
        predicted_kl=0.003,
        recovery=Recovery(4, predicted_kl=0.02, batch_size=8),
        rewind=Rewind(start, 0.01, 4, share=0.1, batch_size=8),
    )
    job = None if folder is None else jedit.Checkpoint(folder, every=2)
    watch = Watching(changed.pop("told", None), job)
    given = {"method": steps, "steps": 4, "every": 2, "significance": 0.9, "watch": watch}
    key = changed.pop("key", KEY)
    budget = changed.pop("budget", None)
    how = Forgetting(**(given | changed))
    return forget(apply, params, gone, kept, unseen=unseen, budget=budget, key=key, how=how)


def to_bytes(found):
    edit, info = found
    arrays = [*jax.tree.leaves(edit), *(getattr(info, name) for name in info._fields[:-1])]
    return [np.asarray(x).tobytes() for x in arrays]


def test_it_goes_on_to_the_bit_wherever_it_is_broken_off(scene, tmp_path, monkeypatch):  # noqa: F811
    whole = run(scene, tmp_path / "whole")
    assert whole[1].steps == 12
    assert whole[1].stopped == "steps"
    saves = []
    write = jedit.Checkpoint.save

    def save(self, step, state, history=None):
        write(self, step, state, history)
        saves.append((self.folder.name, step))
        if saves[-1] in breaks:
            breaks.remove(saves[-1])
            raise Stopped

    monkeypatch.setattr(jedit.Checkpoint, "save", save)
    breaks = [("rewind", 2), ("curvature", 1), ("steps", 6), ("recovery", 10)]
    for _ in range(4):
        with pytest.raises(Stopped):
            run(scene, tmp_path / "job")
    assert to_bytes(run(scene, tmp_path / "job")) == to_bytes(whole)
    # Nothing was done twice.
    legs = [("rewind", 2), ("rewind", 4), ("curvature", 1)]
    legs += [("steps", 6), ("steps", 8), ("recovery", 10), ("recovery", 12)]
    assert saves == legs
    # Done before: no step is taken, the same comes back.
    assert to_bytes(run(scene, tmp_path / "job")) == to_bytes(whole)
    assert saves == legs


def test_a_look_may_stop_it_and_a_changed_call_is_refused(scene, tmp_path):  # noqa: F811
    seen = []

    def stop(look):
        seen.append(look)
        if look.step == 4:
            raise Stopped

    given = {"method": ADAM, "steps": 8, "significance": 0.99}
    with pytest.raises(Stopped):
        run(scene, tmp_path, **given, told=stop)
    assert [look.step for look in seen] == [0, 2, 4]
    for changed in ({"key": jax.random.key(9)}, {"budget": 0.5}, {"steps": 6}):
        with pytest.raises(ValueError, match="was begun with other parameters, data, settings"):
            run(scene, tmp_path, **(given | changed))
    looks = []
    _, info = run(scene, tmp_path, **given, told=looks.append)
    assert [look.step for look in looks] == [0, *range(4, info.steps + 1, 2)]
    assert looks[-1].mean_score == info.mean_score[-1] == pytest.approx(info.score.mean())
    assert looks[0].true_kl == 0
    assert looks[-1].p_value == info.p_value[-1] > info.p_value[0]


def test_looks_come_back_to_the_bit():
    looks = [Look(0, float("nan"), 0.0, 1 / 3), Look(4, 1e-300, 2 / 3, -5.0)]
    again = _looks_of(_bits_of(looks))
    assert repr(again) == repr(looks)


def test_what_stands_beside_the_rows_to_forget(scene):  # noqa: F811
    """A method that wants pairs of rows; the others stand for refusals."""
    params, gone, kept, unseen = scene
    other = gone._replace(targets=(gone.targets + 1) % 5)

    def objective(apply, params, forget, retain, reference):
        del retain, reference
        rows, others = forget
        assert isinstance(others, Batch)
        logits = jax.nn.log_softmax(apply(params, others.inputs))
        same = jax.numpy.all(rows.inputs["row"] == others.inputs["row"])
        told = jax.numpy.take_along_axis(logits, others.targets[:, None], axis=1)
        return jax.numpy.where(same, -told.mean(), jax.numpy.nan), {}

    method = ADAM._replace(objective=objective)
    how = Forgetting(method=method, steps=4)
    _, info = forget(apply, params, (gone, other), kept, unseen=unseen, key=KEY, how=how)
    assert info.loss_after.mean() > info.loss_before.mean() + 0.05
    short = jax.tree.map(lambda x: x[:3], other)
    with pytest.raises(ValueError, match="belong to them, row by row; they have 3, 12 rows"):
        forget(apply, params, (gone, short), kept, key=KEY, how=how)
    with pytest.raises(TypeError, match="forget"):
        forget(apply, params, (gone, 3), kept, key=KEY, how=how)


def test_graded_rows_are_forgotten_and_pairings_are_refused(scene):  # noqa: F811
    params, gone, kept, unseen = scene
    graded = GradedRows(
        gone, (gone.targets + 1) % 5, jax.numpy.arange(12, dtype=jax.numpy.int32) % 3
    )
    how = Forgetting(method=ADAM._replace(objective=FIT()), steps=4)
    _, info = forget(apply, params, graded, kept, unseen=unseen, key=KEY, how=how)
    assert info.loss_after.mean() > info.loss_before.mean() + 0.05
    short = graded._replace(importance=graded.importance[:3])
    with pytest.raises(ValueError, match="belong to them, row by row"):
        forget(apply, params, short, kept, key=KEY, how=how)
    with pytest.raises(ValueError, match="run such a method by jedit.unlearn"):
        Forgetting(method=ADAM._replace(pairing=lambda epoch: epoch))
