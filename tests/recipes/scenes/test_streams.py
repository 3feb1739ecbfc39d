"""The stream scene: what it measures against its own looks, and a whole run on a toy."""

import json

import jax
import numpy as np
import pytest

from jedit.cli.main import main
from jedit.recipes.scenes import streams as scene

TOY = scene.Size(steps=3, memory=10, rank=8, widths=(8, 8))


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """What optax mixes, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The scene at a toy's size, and an empty folder to stand in."""
    pytest.importorskip("sklearn")
    pytest.importorskip("jinja2")
    original = scene.streams
    monkeypatch.setattr(scene, "streams", lambda **given: original(**given, size=TOY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_learner_runs_and_all_is_reported(toy, monkeypatch, capsys):
    monkeypatch.setattr(scene, "ALL_STREAMS", ("turns",))  # those that project compile five times
    given = ["--scene", "stream", "--methods", "all", "--num-seeds", "1", "--seed", "4294967295"]
    assert main(["demo", *given, "--out", "report"]) == 0
    names = {item.name for item in (toy / "report").iterdir()}
    figures = {f"stream-{name}.png" for name in scene.ALL_STREAMS}
    assert names == {"index.html", "results.json"} | figures
    results = json.loads((toy / "report" / "results.json").read_text())
    assert results["schema"] == "jedit.streams/1"
    assert [s["name"] for s in results["streams"]] == list(scene.ALL_STREAMS)
    for stream in results["streams"]:
        assert [one["name"] for one in stream["learners"]] == list(scene.ALL_LEARNERS)
        firsts = set()
        for learner in stream["learners"]:
            (run,) = learner["runs"]
            scores = np.asarray(run["scores"])
            assert scores.shape == (5 * TOY.steps + 1, 5)
            assert run["final"] == pytest.approx(scores[-1].mean())
            lowest = [scores[(i + 1) * TOY.steps + 1 :, i].min() for i in range(4)]
            assert run["minimum"] == pytest.approx(np.mean(lowest))
            assert learner["spread"]["final"] == [run["final"], None]
            firsts.add(tuple(scores[0]))
        assert len(firsts) == 1  # all begin at one place
    page = (toy / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "One seed, so that there are no" in page
    assert "http" not in page
    printed = capsys.readouterr()
    assert "Digits: turned further" in printed.out
    assert "report/index.html" in printed.out


def test_the_main_streams_take_the_place_of_an_earlier_report(toy, monkeypatch, capsys):
    monkeypatch.setattr(scene, "LEARNERS", ("naive", "InTAct"))
    (toy / "report").mkdir()
    (toy / "report" / "tradeoff-digits-class.png").touch()  # of another scene
    (toy / "report" / "stream-turns.png").touch()
    assert main(["demo", "--scene", "stream", "--num-seeds", "2", "--out", "report"]) == 0
    names = {item.name for item in (toy / "report").iterdir()}
    assert names == {"index.html", "results.json", "stream-classes.png", "stream-orders.png"}
    results = json.loads((toy / "report" / "results.json").read_text())
    for stream in results["streams"]:
        assert stream["seeds"] == [0, 1]
        assert [one["name"] for one in stream["learners"]] == ["naive", "InTAct"]
    capsys.readouterr()
    (toy / "report" / "mine.txt").touch()
    assert main(["demo", "--scene", "stream", "--out", "report"]) == 2
    assert "holds files that are no report (mine.txt)" in capsys.readouterr().err


@pytest.mark.usefixtures("toy")
def test_seeds_differ_and_a_run_that_diverges_is_counted_and_not_scored(monkeypatch):
    settings = {**scene.SETTINGS["orders"], "replay": (1e30, 1.0)}
    monkeypatch.setitem(scene.SETTINGS, "orders", settings)
    (found,) = scene.streams(
        seed=3, say=lambda _: None, names=("orders",), chosen=("naive", "replay"), num_seeds=2
    )
    naive, replay = found.learners
    assert [run.seed for run in naive.runs] == [3, 4]
    assert naive.runs[0].scores != naive.runs[1].scores
    mean, half = naive.spread["final"]
    finals = [run.final for run in naive.runs]
    assert mean == pytest.approx(np.mean(finals))
    # Student's t of one degree of freedom.
    assert half == pytest.approx(12.706 * abs(finals[0] - finals[1]) / 2, rel=1e-3)
    assert replay.diverged == (3, 4)
    assert not replay.runs
    assert not replay.spread


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--scene", "digits", "--num-seeds", "2"], "--num-seeds is only looked at with --scene"),
        (["--scene", "stream", "--num-seeds", "0"], "--num-seeds must be at least 1, got 0"),
        (["--scene", "stream", "--forgotten", "choices"], "with --scene recommendation"),
    ],
)
def test_a_mistake_gets_a_sentence(tmp_path, monkeypatch, capsys, given, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *given]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
