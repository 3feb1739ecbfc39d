"""Command lines that nothing can be done with: one line on stderr, exit code 2, nothing written."""

import json

import pytest

from jedit.cli.main import main

LONG = "n" * 300


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in, with rows and a link to nothing beside it."""
    rows = [{"question": f"Who is {i}?", "answer": str(i)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dead").symlink_to(tmp_path / "gone")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


ROWS = ["compare", "--data", "../rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "--out", "\udcff"], r"\udcff: is no valid UTF-8 text"),
        ([*ROWS, "--forget", "author=\ud800"], "is no valid UTF-8 text"),
        (["demo", "--seed", "9" * 10_000], "is a number of 10,000 digits"),
        (["demo", f"--seed=-{'9' * 10_000}"], "is a number of 10,000 digits"),
        ([*ROWS, "--forget", "rows=0:1", "--width", "9" * 10_000], "of 10,000 digits"),
        ([*ROWS, "--forget", f"rows=0:{'9' * 10_000}"], "is not of the form rows=START:STOP"),
        (["demo", "--seed", str(2**70)], "--seed must lie in 0 to 4294967295"),
        (["demo", "--seed", "-1"], "--seed must lie in 0"),
        ([*ROWS, "--forget", "rows=0:1", "--seed", str(2**32)], "--seed must lie in 0"),
        (["demo", "--out", LONG], "nnn: is no usable name (File name too long)"),
        (["compare", "--data", LONG, "--forget", "rows=0:1"], "is no usable name"),
        (["forget", *ROWS[1:], "--forget", "rows=0:1", "--model", LONG], "is no usable name"),
        (["tofu", "--data", LONG], "is no usable name"),
        (["ledger", "list", LONG], "is no usable name"),
        (["demo", "--out", "../dead"], "../dead: is a link to "),
        ([*ROWS, "--forget", "rows=0:1", "--out", "../dead"], "which is not there"),
        (["ledger", "apply", "x", "--base", "y", "--out", "../dead"], "which is not there"),
    ],
)
def test_one_line_and_nothing_written(folder, capsys, arguments, sentence):
    before = sorted(folder.parent.rglob("*"))
    assert main(arguments) == 2
    assert sorted(folder.parent.rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().split("\n")
    assert line.startswith("jedit: ")
    assert sentence in line
    assert len(line) < 400
