"""The command line: what it writes, and that it writes nothing when it cannot."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jedit
from jedit.cli.compare import _grid
from jedit.cli.main import main
from jedit.cli.options import Compare
from jedit.curvature import Factorize
from jedit.data import QaRow
from jedit.methods import CATALOGUE
from jedit.methods.row import Need, Pace
from jedit.recipes.comparison.task import MAIN, Grid
from jedit.recipes.factorizing import RANK
from jedit.recipes.fitting import Recipe
from jedit.recipes.scenes import authors as authors_scene
from jedit.recipes.scenes import digits as digits_scene
from jedit.recipes.scenes import question_answer as qa_scene

GRID = Grid(
    budgets=(0.05,),
    temperatures=(4.0,),
    damping=(0.1,),
    kfade_steps=(1,),
    methods=MAIN,
    rates=dict.fromkeys(Pace, (1e-3,)),
    looks=(2,),
    batch_size=8,
    kl_budget=0.2,
)
NAMES = ["Ana", "Bea", "Cleo", "Dora", "Eva", "Fay", "Gil", "Hal", "Ida", "Jo", "Kim", "Lee"]
SMALL = ["--width", "16", "--layers", "1", "--heads", "2", "--vocab", "300"]


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def write_rows(path):
    """Twelve rows with all optional fields and one more, as JSON lines."""
    rows = [
        {
            "question": f"Who is {name}?",
            "answer": f"{name} is writer number {i * i}.",
            "paraphrased_question": f"Tell me of {name}.",
            "paraphrased_answer": f"Writer {i * i}.",
            "perturbed_answer": [f"Writer {i + 7}.", f"Painter {i}."],
            "shelf": i // 3,
        }
        for i, name in enumerate(NAMES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in, with a file of rows beside it."""
    write_rows(tmp_path / "rows.jsonl")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def fails(capsys, folder, *arguments):
    """The sentence on stderr of a call that must fail and leave nothing behind."""
    before = sorted(folder.parent.rglob("*"))
    assert main(["compare", *arguments]) == 2
    assert sorted(folder.parent.rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().split("\n")
    assert line.startswith("jedit: ")
    return line


@pytest.fixture(scope="module")
def file_run(tmp_path_factory):
    """The folder that `jedit compare` wrote at toy size, after two and after four epochs."""
    folder = tmp_path_factory.mktemp("run")
    data, out = folder / "rows.jsonl", folder / "report"
    write_rows(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authors_scene, "GRID", GRID)
        arguments = ["--data", str(data), "--forget", "shelf=0", "--out", str(out), "--seed", "5"]
        assert main(["compare", *arguments, *SMALL, "--epochs", "2", "4"]) == 0
    return out


def test_a_run_on_a_file_writes_the_whole_report(file_run):
    names = {item.name for item in file_run.iterdir()}
    figures = {f"tradeoff-compare-{epochs}-epochs.png" for epochs in (2, 4)}
    assert names == {"index.html", "results.json"} | figures
    assert [item.name for item in file_run.parent.iterdir() if item.is_dir()] == ["report"]
    results = json.loads((file_run / "results.json").read_text())
    assert results["seed"] == 5
    assert results["command"].startswith("jedit compare --data")
    assert results["versions"]["jedit"] == jedit.__version__
    assert results["machine"]["cores"] >= 1
    assert results["peak_memory_gib"] > 0
    page = (file_run / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # each figure in two layouts
    assert page.count('class="answers"') == 2
    assert "http" not in page


def test_a_run_on_a_file_measures_every_method(file_run):
    for scene in json.loads((file_run / "results.json").read_text())["comparisons"]:
        assert scene["num_rows"]["training"] == 12
        assert scene["num_rows"]["forget"] == 3
        original, retrained = scene["original"], scene["retrained"]
        assert original["heldout_kl"] == pytest.approx(0, abs=1e-6)
        assert retrained["forget_kl"] == pytest.approx(0, abs=1e-6)
        assert retrained["forget_quality"] == pytest.approx(1)
        assert original["test_accuracy"] is not None
        assert [c["method"] for c in scene["curves"]] == [m["name"] for m in scene["methods"]]
        assert len(scene["curves"]) == 5
        for curve in scene["curves"]:
            (point,) = curve["points"]
            assert point["forget_nll"] > original["forget_nll"]
            assert point["truth_ratio"] > 0
            if curve["method"].startswith("K-FADE"):
                assert 0 < point["true_kl"] <= 0.05 * 1.001
        asked = [(answer["kind"], answer["question"]) for answer in scene["answers"]]
        assert ("forget", "Who is Ana?") in asked
        assert len(asked) == 6


def test_the_digits_scene(folder, monkeypatch, capsys):
    original = digits_scene.digits

    def toy(*, seed, say, grid):
        assert grid is digits_scene.ALL
        recipe = digits_scene.RECIPE._replace(epochs=(5,), learning_rate=1e-2)
        small = {"recipe": recipe, "channels": (4, 4), "hidden": 16}
        return original(seed=seed, say=say, grid=GRID, **small)

    monkeypatch.setattr(digits_scene, "digits", toy)
    assert main(["demo", "--scene", "digits", "--methods", "all", "--out", "digits"]) == 0
    results = json.loads((folder / "digits" / "results.json").read_text())
    parts = results["comparisons"]
    assert [c["name"] for c in parts] == ["digits-cluster", "digits-class"]
    assert [item.name for item in folder.iterdir()] == ["digits"]
    for part in parts:
        assert part["original"]["test_accuracy"] > 0.5
        assert part["original"]["truth_ratio"] is None
        assert part["original"]["forget_nll"] < part["retrained"]["forget_nll"]
        rows = part["num_rows"]
        assert rows["forget"] + sum(n for name, n in rows.items() if "retain" in name) == 1347
        assert {len(p["pixels"]) for p in part["pictures"]} == {8}
        assert [p["kind"] for p in part["pictures"]] == ["forget"] * 6 + ["retain"] * 6
        assert {p["truth"] for p in part["pictures"][:6]} == {"7"}
        assert part["num_judged"]["forget"] == rows["forget"]
    # Nobody told the second reference what a seven is.
    assert parts[1]["retrained"]["forget_accuracy"] < 0.05
    printed = capsys.readouterr()
    assert "minutes on two free CPU cores" in printed.err
    assert "held-out retain rows" in printed.out
    assert "K-FADE (EK-FAC)" in printed.out
    assert "digits/index.html" in printed.out
    assert "retraining without the" in printed.err


def test_a_missing_file(folder, capsys):
    line = fails(capsys, folder, "--data", "gone.jsonl", "--forget", "rows=0:3")
    assert "gone.jsonl: there is no such file" in line


def test_a_row_without_the_fields(folder, capsys):
    path = folder.parent / "rows.jsonl"
    path.write_text(path.read_text() + '{"question": "And this one?"}\n')
    line = fails(capsys, folder, "--data", str(path), "--forget", "rows=0:3")
    assert f'{path}:13: the row has no field "answer"' in line


def test_an_empty_forget_set(folder, capsys):
    data = str(folder.parent / "rows.jsonl")
    assert "rows=3:3 selects nothing" in fails(
        capsys, folder, "--data", data, "--forget", "rows=3:3"
    )
    line = fails(capsys, folder, "--data", data, "--forget", "author=Ana")
    assert 'has the field "author"; there are answer, question, shelf.' in line
    assert "it has 0, 1, 2, 3." in fails(capsys, folder, "--data", data, "--forget", "shelf=4")
    empty = folder.parent / "empty.jsonl"
    empty.write_text("\n")
    line = fails(capsys, folder, "--data", data, "--forget", str(empty))
    assert f"{empty}: the file holds no rows" in line


def test_forget_rows_that_also_stand_in_retain(folder, capsys):
    path = folder.parent / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    forget, retain = folder.parent / "forget.jsonl", folder.parent / "retain.jsonl"
    forget.write_text("".join(lines[:3]))
    retain.write_text("".join(lines[2:]))
    arguments = ["--data", str(path), "--forget", str(forget), "--retain", str(retain)]
    line = fails(capsys, folder, *arguments)
    assert f"{forget}:3" in line
    assert f"{retain}:1" in line


def test_forgetting_all_but_one_row(folder, capsys):
    data = str(folder.parent / "rows.jsonl")
    line = fails(capsys, folder, "--data", data, "--forget", "rows=0:11")
    assert "1 row to retain; at least 2" in line
    line = fails(capsys, folder, "--data", data, "--forget", "rows=0:12")
    assert "forgets all 12 rows" in line


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--heads", "3", "not a multiple"),
        ("--epochs", "0", "--epochs must be at least 1"),
        ("--vocab", "100", "--vocab must be at least 258"),
        ("--layers", "0", "--layers must be at least 1, got 0"),
        ("--max-len", "2", "--max-len must be at least 8"),
        ("--learning-rate", "inf", "--learning-rate must be a finite number, got inf"),
    ],
)
def test_a_size_that_makes_no_model(folder, capsys, option, value, sentence):
    data = str(folder.parent / "rows.jsonl")
    line = fails(capsys, folder, "--data", data, "--forget", "rows=0:3", option, value)
    assert sentence in line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--methods", "nothing"], "unknown methods: nothing; there are K-FADE (K-FAC), "),
        (
            ["--methods", "SAE-guided"],
            "SAE-guided needs latents of known and of unknown rows, which jedit compare has not.",
        ),
        (
            ["--factorize", "cholesky"],
            "K-FADE (EK-FAC) takes leading eigenvectors of its curvature",
        ),
        (["--factorize", "inverse", "--rank", "3"], "--factorize inverse, --rank 3: rank=3 keeps"),
    ],
)
def test_factors_that_a_method_has_no_use_for(folder, capsys, options, sentence):
    data = str(folder.parent / "rows.jsonl")
    line = fails(capsys, folder, "--data", data, "--forget", "rows=0:3", *options)
    assert sentence in line


def test_every_other_method_is_served_by_rows_of_ones_own():
    given = Compare(Path("rows.jsonl"), "rows=0:3")
    names = tuple(name for name, row in CATALOGUE.items() if Need.LATENTS not in row.needs)
    assert _grid(dataclasses.replace(given, methods=names), Factorize()).methods == names
    assert set(CATALOGUE) - set(names) == {"SAE-guided"}


def test_a_scene_refuses_what_its_rows_do_not_give_before_it_trains():
    grid = authors_scene.GRID._replace(methods=("SAE-guided",))
    with pytest.raises(ValueError, match="SAE-guided needs latents .*, which mine has not"):
        qa_scene.served(grid, "mine", has_unseen=False)
    assert qa_scene.served(grid, "mine", has_unseen=True).methods == grid.methods
    rows = [QaRow(f"Who is {i}?", f"It is {i}.") for i in range(4)]
    how = {"model": qa_scene.Model(8, 1, 1, 300, 16), "recipe": Recipe((1,), 2, 1e-3)}
    given = (qa_scene.Selection(rows, rows[:1], rows[1:]), qa_scene.Caption("mine", "", ""))
    with pytest.raises(ValueError, match="which mine has not"):
        qa_scene.question_answer(*given, **how, grid=grid, seed=0, say=pytest.fail)


def test_tofu_refuses_them_before_it_reads_anything(capsys):
    given = ["tofu", "--data", "nowhere", "--methods", "K-FADE (EK-FAC)", "--factorize", "cholesky"]
    assert main(given) == 2
    assert "K-FADE (EK-FAC) takes leading eigenvectors of its curvature" in capsys.readouterr().err


def test_factors_are_kept_as_all_the_methods_take_them():
    """By size for solves alone; with leading ones of long axes where one of them takes these."""
    given = Compare(Path("rows.jsonl"), "rows=0:3")
    assert _grid(given, Factorize("auto")).factorize == Factorize("auto", RANK)
    alone = dataclasses.replace(given, methods=("K-FADE (K-FAC)", "NPO"))
    for how in (Factorize("auto"), Factorize("cholesky"), Factorize(rank=5)):
        assert _grid(alone, how) == authors_scene.GRID._replace(
            methods=alone.methods, factorize=how
        )


def test_a_folder_that_is_no_report_is_refused_before_any_work(folder, capsys):
    (folder.parent / "thesis.tex").write_text("years of work")
    data = str(folder.parent / "rows.jsonl")
    out = str(folder.parent)
    line = fails(capsys, folder, "--data", data, "--forget", "rows=0:3", "--out", out)
    assert "holds files that are no report" in line


@pytest.mark.parametrize("arguments", [[], ["tofu"], ["--model", "x"]])
def test_what_became_of_run(folder, capsys, arguments):
    assert main(["run", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for command in ("jedit forget --model DIR", "jedit compare", "jedit tofu"):
        assert f"`{command}`" in line
    assert not list(folder.iterdir())


def test_an_unknown_option_is_a_usage_error(folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--sceen", "digits"])
    assert caught.value.code == 2
    assert not list(folder.iterdir())
    assert "sceen" in capsys.readouterr().err


def test_an_error_in_the_middle_writes_nothing(folder, monkeypatch):
    def breaks(**_):
        raise RuntimeError("the machine is tired")

    monkeypatch.setattr(digits_scene, "digits", breaks)
    with pytest.raises(RuntimeError, match="tired"):
        main(["demo", "--scene", "digits"])
    assert not list(folder.iterdir())


def test_the_module_runs_and_knows_its_version():
    out = subprocess.run(
        [sys.executable, "-m", "jedit", "--version"], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == f"jedit {jedit.__version__}"


def test_tofu_files_are_read_as_they_are(folder, shared_data, monkeypatch):
    tofu = shared_data / "tofu"
    if not tofu.is_dir():
        pytest.skip(f"needs TOFU, which is not part of the repository: {tofu} is absent")
    calls = []
    monkeypatch.setattr(
        qa_scene, "question_answer", lambda rows, *_, **__: calls.append(rows) or ()
    )
    arguments = ["--data", str(tofu / "full.json"), "--out", str(folder / "out")]
    perturbed, retain = (str(tofu / f"{name}.json") for name in ("forget10_perturbed", "retain90"))
    assert main(["compare", *arguments, "--forget", perturbed, "--retain", retain]) == 0
    ((data, forget, kept, unseen),) = calls
    assert (len(data), len(forget), len(kept), len(unseen)) == (4000, 400, 3600, 0)
    assert all(row.paraphrased_answer and len(row.perturbed_answer) == 5 for row in forget)
