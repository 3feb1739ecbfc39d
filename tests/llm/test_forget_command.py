"""`jedit forget`: a pretrained model's folder in, an edited one out."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jedit
from jedit.checkpoint.disk import locked
from jedit.core.paths import parameter_paths
from jedit.data import QaRow, write_rows
from jedit.models import load_model
from jedit.recipes.folders.settings import Settings
from jedit.recipes.pretrained import forget_in_checkpoint

pytestmark = pytest.mark.usefixtures("standard_promotion")
NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
NAMES_THERE = ["edit", "edited", "index.html", "results.json"]
ROWS = [
    QaRow(f"What did {name} do?", f"{name} went to the park to play with a big red ball.")
    for name in NAMES
]


UNSEEN = [
    QaRow(f"What did {name} do?", f"{name} sang a slow song about a fox in a far land.")
    for name in ("Kim", "Lou", "Roy", "Eva", "Ida", "Leo", "Jim", "Zoe")
]


def forgotten(folder, out, settings, say=lambda _: None, **given):
    sets = (ROWS[:2], ROWS[2:]) if "forget" not in given else (given.pop("forget"), ROWS[4:])
    return forget_in_checkpoint(folder, folder, *sets, out, settings, say=say, **given)


@pytest.fixture(scope="module")
def run(stories_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    said = []
    settings = Settings(method="kfade", budget=0.1, batch_size=4, attack=False)
    return forgotten(stories_folder, out, settings, said.append), out, said


def test_it_forgets_within_the_budget_and_says_so(run):
    found, out, said = run
    assert found["num_cut_off"] == {"forget": 0, "retain": 0, "heldout": 0}
    assert sorted(path.name for path in out.iterdir()) == NAMES_THERE
    assert found["num_rows"] == {"forget": 2, "retain": 4, "heldout": 2}
    assert found["after"]["forget_nll"] > found["before"]["forget_nll"] + 0.05
    assert 0 < found["true_kl"] <= 0.1
    assert found["before"]["heldout_kl"] == pytest.approx(0, abs=1e-6)
    assert found["after"]["heldout_kl"] > 0
    assert json.loads((out / "results.json").read_text())["after"] == found["after"]
    assert any("forgetting by K-FADE (K-FAC)" in text for text in said)


def test_natural_steps_are_the_default_and_say_how_they_went(stories_folder, tmp_path):
    """A test of eight unseen rows against four that the model finds likelier."""
    settings = Settings(batch_size=4, steps=8, recovery=0)
    found = forgotten(stories_folder, tmp_path / "out", settings, forget=ROWS[:4], unseen=UNSEEN)
    assert found["stopped"] == "unseen"
    assert found["p_value"][-1] > 0.05 >= found["p_value"][-2]
    assert len(found["is_done"]) == 4
    assert len(found["p_value"]) == len(found["path_kl"]) >= 2
    assert found["after"]["forget_nll"] > found["before"]["forget_nll"] + 0.05
    mean, low, high = found["comeback"]["after"]
    assert 0 < low <= mean <= high < 1
    assert found["comeback"]["unseen"] is not None
    assert json.loads((tmp_path / "out" / "results.json").read_text())["p_value"][0] < 0.05


def test_natural_steps_keep_the_budget(stories_folder, tmp_path):
    settings = Settings(batch_size=4, steps=8, budget=0.02, attack=False)
    found = forgotten(stories_folder, tmp_path / "out", settings)
    assert found["stopped"] == "budget"
    assert 0.015 < found["true_kl"] <= 0.02
    assert "comeback" not in found
    # NaN, where there are no unseen rows, is null in the file.
    assert json.loads((tmp_path / "out" / "results.json").read_text())["p_value"][0] is None


def test_the_edited_folder_is_the_edited_model(run, stories_model, stories_folder):
    found, out, _ = run
    apply, params, _ = load_model(out / "edited")
    assert (out / "edited" / "tokenizer.json").read_bytes() == (
        stories_folder / "tokenizer.json"
    ).read_bytes()
    tokens = np.random.default_rng(0).integers(3, 512, (2, 9))
    before = stories_model[0](stories_model[1], tokens)
    assert float(jnp.max(jnp.abs(apply(params, tokens) - before))) > 1e-3
    assert found["rounded_away"] < 1e-3


def test_a_question_that_fills_the_row_is_refused(stories_folder, tmp_path):
    rows = [*ROWS[:2], QaRow("Why " * 60, "because", file="rows.jsonl", line=3)]
    with pytest.raises(ValueError, match="rows.jsonl:3: no answer is among the first 40 tokens"):
        forget_in_checkpoint(
            stories_folder,
            stories_folder,
            ROWS[2:4],
            rows,
            tmp_path / "out",
            Settings(max_len=40),
            say=lambda _: None,
        )


def test_spans_of_the_forget_rows_alone_are_refused(stories_folder, tmp_path):
    marked = [row._replace(forget_span=((0, 2),)) for row in ROWS[:2]]
    given = (stories_folder, stories_folder, marked, ROWS[4:], tmp_path / "out", Settings())
    with pytest.raises(ValueError, match="forget_span in both, or in none"):
        forget_in_checkpoint(*given, unseen=ROWS[2:4], say=lambda _: None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Settings(method="npo", base=Path("base")), "--base is only looked at with --method nat"),
        (Settings(base=Path("base"), layers=(1,)), "--base edits all parameters"),
    ],
)
def test_settings_that_would_not_be_looked_at(stories_folder, tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        forgotten(stories_folder, tmp_path / "out", settings)


def test_too_few_rows_are_refused_before_the_model_is_loaded(tmp_path):
    given = (tmp_path / "none", tmp_path / "none", ROWS[:2])
    with pytest.raises(ValueError, match="2 rows to keep; at least 3 are needed"):
        forget_in_checkpoint(*given, ROWS[6:], tmp_path, Settings(), say=lambda _: None)
    with pytest.raises(ValueError, match="2 unseen ones are too few"):
        forget_in_checkpoint(
            *given, ROWS[2:], tmp_path, Settings(), unseen=UNSEEN[:2], say=lambda _: None
        )


def test_a_job_that_another_process_is_at(stories_folder, tmp_path, capsys):
    pytest.importorskip("tyro")
    from jedit.cli.main import main

    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    write_rows(data, ROWS)
    (out / "job").mkdir(parents=True)
    given = ["forget", "--data", str(data), "--forget", "rows=0:2", "--out", str(out)]
    with locked(out / "job" / "lock", busy=""):
        assert main([*given, "--model", str(stories_folder)]) == 2
    assert "another process is at this job" in capsys.readouterr().err


def test_from_the_command_line(stories_folder, tmp_path, capsys):
    pytest.importorskip("tyro")
    from jedit.cli.main import main

    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    write_rows(data, ROWS)
    given = ["forget", "--data", str(data), "--forget", "rows=0:2", "--out", str(out)]
    given += ["--model", str(stories_folder), "--batch-size", "4", "--ledger", str(tmp_path / "l")]
    write_rows(tmp_path / "unseen.jsonl", UNSEEN[:2])
    for more, sentence in (
        (["--select", "conv"], "names no parameter; there are, with N for a number, "),
        (["--layers", "3-9"], "there is no block 5; the model has 0 to 4"),
        (["--unseen", str(tmp_path / "unseen.jsonl")], "are too few"),
    ):
        assert main([*given, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert not out.exists()
    assert main([*given, "--steps", "4", "--recovery", "2", "--layers", "1,3"]) == 0
    shown = capsys.readouterr().out
    assert "forget nll" in shown
    assert "6 steps in all: all are taken" in shown
    assert "is taught again" in shown
    assert "Without --unseen rows it was not tested" in shown
    assert "as entry 1." in shown
    last = shown.strip().splitlines()[-1]
    arguments = f"--base {stories_folder} --edited {out / 'edited'} --data {data} --forget rows=0:2"
    assert last == f"To judge it in full: jedit audit {arguments} --batch-size 4"
    assert sorted(path.name for path in out.iterdir()) == NAMES_THERE
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    # The edit is that of the blocks that were named; the folder, the base and the edit.
    edit = jedit.checkpoint.load_edit(out / "edit")
    assert {path.split("/")[1] for path in edit.blocks} == {"1", "3"}
    base, edited = (load_model(x)[1] for x in (stories_folder, out / "edited"))
    for one, other in zip(
        jax.tree.leaves(jedit.apply_edit(base, edit)), jax.tree.leaves(edited), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    ledger = jedit.Ledger(tmp_path / "l")
    (entry,) = ledger.find({"question": ROWS[0].question, "answer": ROWS[0].answer})
    assert (entry.method, entry.seed, entry.number) == ("natural", 0, 1)
    # A second request is of the model with the first.
    second = ["rows=4:6" if x == "rows=0:2" else x for x in given]
    more = ["--method", "kfade", "--budget", "0.1", "--no-attack", "--layers", "2"]
    assert main([*second, *more]) == 0
    assert "holds earlier edits of the ledger (1)" in capsys.readouterr().out
    both = load_model(out / "edited")[1]
    for one, other in zip(jax.tree.leaves(ledger.params(base)), jax.tree.leaves(both), strict=True):
        np.testing.assert_array_equal(one, other)
    blocks = [dict(parameter_paths(x))["layers/1/mlp/up_proj/kernel"] for x in (edited, both)]
    np.testing.assert_array_equal(*blocks)
    assert main([*(str(out / "edited") if x == str(stories_folder) else x for x in given)]) == 2
    assert "would be replaced by the edited model" in capsys.readouterr().err
    (out / "edited").rename(tmp_path / "other")
    assert main([*(str(tmp_path / "other") if x == str(stories_folder) else x for x in given)]) == 2
    assert "is the ledger of another model" in capsys.readouterr().err
    (out / "mine.txt").write_text("x")
    assert main(given) == 2
    assert "mine.txt" in capsys.readouterr().err
