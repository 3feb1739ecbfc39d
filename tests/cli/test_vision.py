"""`jedit vision`: what it writes, and that mistakes are refused before any work."""

import jax
import pytest

from jedit.cli.main import main

SMALL = ["--width", "4", "--blocks", "1", "--train-epochs", "1", "--rows", "80", "--seeds", "0"]


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax mixes, its counter and its rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_it_writes_the_tables_and_the_runs(tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    given = ["vision", *SMALL, "--out", str(out), "--points", "published", "--tasks", "class"]
    assert main([*given, "--methods", "fine-tune", "--batch-size", "32"]) == 0
    shown = capsys.readouterr().out
    assert "retrained" in shown
    assert "modified entropy" in shown
    table = (out / "class" / "table.md").read_text()
    assert "| fine-tune | learning rate 0.01, batch size 32, epochs 10 |" in table
    assert "80 images of 8x8x1 and forgets a class" in table
    assert len(list((out / "class" / "runs").iterdir())) == 3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--cifar", "a", "--mnist", "b"], "give --cifar or --mnist, one of the two"),
        (["--cifar", "nowhere"], "nowhere: there is no such folder"),
        (["--cifar", "."], "holds neither data_batch_1.bin nor data_batch_1; give the folder"),
        (["--mnist", "."], "holds neither train-images-idx3-ubyte nor"),
        (["--methods", "IdkDPO"], "IdkDPO needs refusals, which an image classifier has not"),
        (["--methods", "nothing"], "unknown methods: nothing"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--fraction", "1.5"], "--fraction must"),
        (["--train-rate", "-1"], "--train-rate must be positive"),
        (["--seeds", "1000009"], "the one that points are chosen on"),
    ],
)
def test_a_mistake_gets_a_sentence(tmp_path, monkeypatch, capsys, given, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["vision", *given, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jedit: ")
    assert sentence in error
    assert not (tmp_path / "out").exists()
