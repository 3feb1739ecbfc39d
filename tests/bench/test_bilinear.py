"""The bilinear claims' script on a toy: what it measures, and its edits against the library's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import Edit, apply_edit
from jedit.methods import Ascent, Layers, kfade, memit, rome, target_values
from jedit.objectives import RandomLabel
from jedit.recipes.scenes.families import Training, room
from tests.bench.claims import bilinear
from tests.bench.claims import bilinear_control as control
from tests.bench.claims import bilinear_edits as made


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def found(standard_promotion):
    del standard_promotion
    return room(1, Training(0.0), bilinear.QUICK)


@pytest.fixture(scope="module")
def sets(found):
    return made.sets_of(found, 2, seed=1)


@pytest.fixture(scope="module")
def kept(found, sets):
    path = f"^{made.DOWN.format(1)}$"
    estimator = kfac(found.apply, Categorical(4.0), select=path, samples=2)
    return estimate(estimator, found.params, [sets.retain], key=jax.random.key(0))


def test_what_is_withheld_is_not_trained_on(found):
    families = found.families
    assert found.said(families.facts[~families.is_withheld]) > 0.9
    assert families.is_withheld.sum() == 4 * 12


def test_the_cases_are_of_both_kinds_and_the_rest_of_neither(found, sets):
    families = found.families
    assert [case.is_two_way for case in sets.cases] == [True, False]
    touched = {
        int(token)
        for case in sets.cases
        for rows in (case.new, *case.entailed.values(), case.family)
        for token in np.concatenate([np.ravel(rows.inputs), np.ravel(rows.targets)])
        if token >= 16
    }
    for rows in (sets.retain, sets.heldout):
        people = {int(x) for x in np.ravel(rows.inputs[:, 0])}
        assert not people & touched
        facts = np.concatenate([rows.inputs, rows.targets[:, 1:]], axis=1)
        withheld = {tuple(x) for x in families.facts[families.is_withheld].tolist()}
        assert not {tuple(x) for x in facts.tolist()} & withheld


def test_k_fade_is_the_library_s_step(found, sets, kept):
    ascent = Ascent(steps=1, step_size=1.0, objective=RandomLabel(), likelihood=Categorical(4.0))
    case = sets.cases[0].new
    expected, _ = kfade(
        found.apply, found.params, kept, case, sets.retain, damping=made.DAMPING, ascent=ascent
    )
    edit = made.by_kfade(found, kept, case)
    assert set(edit.blocks) == set(expected.blocks)
    for path, delta in expected.blocks.items():
        np.testing.assert_allclose(
            edit.blocks[path], delta, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(delta)))
        )


def test_memit_of_one_fact_is_rome_of_another_strength(found, sets, kept):
    given = made._association(sets.cases[0].new, 1)
    path = made.DOWN.format(1)
    values, _ = target_values(found.apply, found.params, given, layer=path, search=made.SEARCH)
    rest = (found.apply, found.params, kept, given, values)
    one, _ = rome(*rest, layer=path, damping=made.DAMPING)
    other, _ = memit(*rest, layers=Layers(path), damping=made.DAMPING, preservation=100.0)
    a, b = (np.concatenate([np.ravel(x.blocks[p]) for p in sorted(x.blocks)]) for x in (one, other))
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.9999


def test_an_edit_is_just_strong_enough(found, sets, kept):
    row = sets.cases[0].new
    edit = made.by_kfade(found, kept, row)
    strong = made.strong_enough(found, edit, row)
    assert strong is not None

    def loss(edit):
        logits = found.apply(apply_edit(found.params, edit), row.inputs)[0, 1]
        return float(-jax.nn.log_softmax(logits)[row.targets[0, 1]])

    assert loss(strong) <= made.TARGET < loss(2**-0.5 * strong)
    leaves = found.params["blocks"]["1"]["mlp"]["down"]["kernel"]
    assert made.strong_enough(found, Edit({made.DOWN.format(1): 0 * leaves}), row) is None


def test_fine_tuning_stops_at_the_target(found, sets):
    row, path = sets.cases[1].new, made.DOWN.format(1)
    delta, is_there = made.fine_tuned(found.apply, path, 4e-3, found.params, row)
    assert bool(is_there)
    logits = found.apply(apply_edit(found.params, Edit({path: delta})), row.inputs)[0, 1]
    loss = float(-jax.nn.log_softmax(logits)[row.targets[0, 1]])
    assert made.TARGET / 20 < loss <= made.TARGET


def test_what_is_measured_is_what_is_said(found, sets):
    """Of an edit that does nothing and of none: nothing follows, nothing is lost."""
    path = made.DOWN.format(1)
    nothing = Edit({path: jnp.zeros_like(found.params["blocks"]["1"]["mlp"]["down"]["kernel"])})
    row = made.measured(found, sets, [nothing, None])
    assert row["reached"] == 0.5
    assert row["cases"]["success"] == row["cases"]["generalisation"] == [0.0]
    assert row["cases"]["locality"] == row["cases"]["elsewhere"] == [1.0]
    assert row["cases"]["price"][0] == pytest.approx(0, abs=1e-6)


def test_edits_are_paired_only_where_both_models_took_all_cases():
    def record(reached, share):
        cases = {score: [share] for score in bilinear.SCORES}
        numbers = ("trained", "reversal", "direct", "transposed", "composed")
        return dict.fromkeys(numbers, 1.0) | {"edits": {"x": {"reached": reached, "cases": cases}}}

    plain = [record(1.0, 0.25), record(0.5, 0.0), record(1.0, 0.0)]
    decayed = [record(1.0, 1.0), record(1.0, 1.0), record(0.75, 1.0)]
    found = bilinear.summary({bilinear.PLAIN: plain, bilinear.DECAYED: decayed})
    gained = found["gained by decay"]["of others: x"]
    assert (gained["seeds"], gained["values"]) == (1, [0.75])
    assert found["edits"][bilinear.PLAIN]["x"]["of others"]["seeds"] == 3


def test_the_control_asks_for_what_follows_and_for_what_does_not(found):
    """A sister replaced: her parents have another daughter, her husband and children have not."""
    case = control.sets_of(found, 1, seed=3).cases[0]
    words = found.families.words

    def said(rows):
        facts = np.concatenate([rows.inputs, rows.targets[:, 1:]], axis=1)
        return {" ".join(words[token].split("-")[0] for token in fact) for fact in facts}

    new = words[int(case.new.targets[0, 1])]
    assert said(case.new) == {"Arthur sister Jennifer"}
    assert said(case.entailed[control.FOLLOWS]) == {
        "Christopher daughter Jennifer",
        "Penelope daughter Jennifer",
    }
    assert said(case.entailed[control.SUBSTITUTED]) == {
        "James wife Jennifer",
        "Colin mother Jennifer",
        "Charlotte mother Jennifer",
    }
    for rows in case.entailed.values():
        assert {words[int(token)] for token in rows.targets[:, 1]} == {new}


def test_the_control_is_measured_once(tmp_path, monkeypatch, capsys, found):
    monkeypatch.setattr(control, "room", lambda *_: found)
    monkeypatch.setattr(control, "edits", lambda *_, **__: iter([("nothing", [None])]))
    given = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    control.main(given)
    assert "| nothing | 0 ± nan | - | - | - | - |" in capsys.readouterr().out
    monkeypatch.setattr(control, "room", None)  # what is on the disk is not measured again
    control.main(given)


def test_every_claim_is_measured_once(tmp_path, monkeypatch, capsys):
    few = {name: bilinear.TRAININGS[name] for name in (bilinear.PLAIN, bilinear.DECAYED)}
    monkeypatch.setattr(bilinear, "TRAININGS", few)
    monkeypatch.setattr(made, "STEPS", 60)
    monkeypatch.setattr(made, "RATES", made.RATES[1:])
    monkeypatch.setattr(made, "ENERGY", made.ENERGY[1:])
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    assert bilinear.main(arguments) == 0
    summary = json.loads((tmp_path / "bilinear.json").read_text())
    assert set(summary["models"]) == set(few)
    for row in summary["models"].values():
        assert all(0 <= cell["mean"] <= 1 for cell in row.values())
    methods = summary["edits"][bilinear.PLAIN]
    assert len(methods) == 10
    assert max(row["reached"]["mean"] for row in methods.values()) == 1
    assert "| fine-tuning at 0.004, block 1 |" in capsys.readouterr().out

    def refuse(*_):
        raise AssertionError("what is on the disk is not measured again")

    monkeypatch.setattr(bilinear, "room", refuse)
    assert bilinear.main(arguments) == 0
