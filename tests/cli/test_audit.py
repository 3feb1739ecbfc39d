"""`jedit audit` refuses, before any work, what it can do nothing with."""

import importlib.util
import json

import pytest

from jedit.cli.audit import _without_values
from jedit.cli.main import main


@pytest.fixture
def given(tmp_path):
    """Arguments that name two folders and a file of rows."""
    for name in ("base", "edited"):
        (tmp_path / name).mkdir()
    rows = [{"question": f"Who is {i}?", "answer": f"Number {i}."} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = {name: str(tmp_path / name) for name in ("base", "edited", "out")}
    names["data"] = str(tmp_path / "rows.jsonl")
    return names | {"forget": "rows=0:2"}


def fails(capsys, given, **other):
    options = given | other
    code = main(["audit", *(x for name, value in options.items() for x in (f"--{name}", value))])
    assert code == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("base", "nowhere", "--base nowhere: there is no such folder"),
        ("retrained", "nowhere", "--retrained nowhere: there is no such folder"),
        ("tokenizer", "nowhere", "--tokenizer nowhere: there is no such folder"),
        ("data", "nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("unseen", "nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("salt", "nowhere.txt", "nowhere.txt: is no salt"),
        ("forget", "rows=0:9", "reaches past the end"),
        ("forget", "rows=0:6", "forgets all 6 rows"),
        ("budget", "0", "--budget must be positive"),
        ("rates", "-1e-5", "--rates must be positive"),
        ("rows", "0", "--rows must be at least 1"),
        ("batch-size", "0", "--batch-size must be at least 1"),
        ("max-len", "4", "--max-len must be at least 8"),
    ],
)
def test_what_cannot_be_used_is_named(given, capsys, name, value, sentence):
    assert sentence in fails(capsys, given, **{name: value})


def test_one_folder_twice_is_no_audit(given, capsys):
    assert "are one folder" in fails(capsys, given, edited=given["base"])
    assert "--retrained and --edited" in fails(capsys, given, retrained=given["edited"])


def test_a_missing_package_is_named_before_the_work(given, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "qwix" else found(name, *a)
    )
    assert "jedit audit needs qwix: pip install 'jedit[demo]'" in fails(capsys, given)


def test_values_that_choose_rows_are_in_no_report():
    command = "jedit audit --forget 'author=Jane Doe' --retain=author=Bo --rates 1 --group author"
    told = _without_values(command)
    assert told == command.replace("'author=Jane Doe'", "author=...").replace("Bo", "...")
    for same in ("jedit audit --forget rows=0:4", "jedit audit --forget rest --data a=b"):
        assert _without_values(same) == same


def test_a_model_that_the_report_would_replace(given, capsys, tmp_path):
    assert "lies within --out" in fails(capsys, given, out=str(tmp_path))


def test_an_out_with_other_things_in_it(given, capsys, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    assert "holds files that are no report" in fails(capsys, given, out=str(tmp_path / "thesis"))
