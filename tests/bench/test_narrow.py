"""The scripts about narrow unlearning, on toys, and what they make of numbers that are known."""

import json

import pytest

from tests.bench.claims import narrow, narrow_refusal
from tests.bench.claims.evidence import known_interval

pytestmark = pytest.mark.usefixtures("standard_promotion")


class AllButParity(narrow.Judged):
    """Of a model that has not learnt one of the tasks."""

    def __init__(self, seed, plan):
        super().__init__(seed, plan)
        self.learnt.remove("parity")


def test_tasks_are_measured_once(tmp_path, monkeypatch):
    # A method by steps and one by a budget: each other one is compiled like one of the two.
    monkeypatch.setattr(narrow, "METHODS", ("random labels", narrow.KFADE))
    monkeypatch.setattr(narrow, "QUICK", narrow.QUICK._replace(compared=("first", "parity")))
    monkeypatch.setattr(narrow, "Judged", AllButParity)
    given = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    narrow.main(given)
    run = {}
    for part in ("tasks", "points"):
        run |= json.loads((tmp_path / f"narrow-{part}-quick-0.json").read_text())
    learnt = set(narrow.TASKS) - {"parity"}
    assert set(run["tasks"]) == learnt
    assert {name.split(": ")[1] for name in run["points"]} == {"first"}
    for task, one in run["tasks"].items():
        assert set(one["nearness"]) == learnt - {task}
        assert 0.5 <= one["confidence"] <= 1
        assert one["hidden_variance"] > 0
        assert one["unnormed_variance"] > 0
        value, low, high = one["by rate"]["0.001"]
        assert value == pytest.approx(one["ratios"][task], nan_ok=True)
        assert low < high
        assert 0 <= one["coins"]["0.001"] <= 1
        assert all(0 <= x <= 1 for x in (*one["probe"], *one["said"]))
    looks = [at for at, _ in run["points"]["random labels: first"]]
    assert looks == ["0.001, 1 steps", "0.001, 2 steps"]
    assert [at for at, _ in run["points"]["K-FADE (K-FAC): first"]] == ["0.1, 0.1"]
    monkeypatch.setattr(narrow, "Judged", None)  # what is on the disk is not measured again
    narrow.main(given)
    (tmp_path / "narrow-points-quick-0.json").unlink()
    narrow.main([*given, "--tasks-only"])


def test_seeds_without_a_number_are_left_out_and_counted():
    found = known_interval([1.0, float("nan"), 3.0])
    assert (found["mean"], found["seeds"], found["values"]) == (2, 2, [1, 3])
    assert known_interval([float("nan")])["seeds"] == 0


def test_the_cheapest_point_that_forgets_half_is_taken_and_judged_elsewhere():
    def point(choice, others, test):
        return {"choice": choice, "choice others": others, "test": test, "test others": 2 * others}

    points = {
        "NPO: first": [("a", point(0.4, 0.0, 0.5)), ("b", point(0.6, 0.3, 0.7))],
        "NPO: repeat": [("c", point(0.9, 0.2, 1.0)), ("d", point(0.5, 0.1, 0.4))],
        f"{narrow.KFADE}: first": [("e", point(0.8, 0.1, 0.6))],
        f"{narrow.KFADE}: repeat": [("f", point(0.1, 0.0, 0.1))],
    }
    assert narrow.chosen(points["NPO: first"])[0] == "b"
    assert narrow.chosen(points["NPO: repeat"])[0] == "d"
    assert narrow.chosen(points[f"{narrow.KFADE}: repeat"]) is None
    run = {"points": points}
    found = narrow._cost(run, "NPO")
    assert found == pytest.approx({"reached": 1, "others": (0.6 + 0.2) / 2, "task": 0.55})
    assert narrow._cost(run, narrow.KFADE)["reached"] == 0.5


def test_claims_of_numbers_that_are_known():
    def task(name, ratio, confidence, probe, reach):
        ratios = {"a": 0.0, "b": 0.1, "c": 0.2, name: ratio}
        return {
            "accuracy": 0.99,
            "confidence": confidence,
            "hidden_variance": -confidence,
            "ratios": ratios,
            "unnormed_variance": confidence,
            "by rate": {"0.001": [ratio, ratio - reach, ratio + reach]},
            "coins": {"0.001": 0.7},
            "nearness": {n: i for i, n in enumerate("abc") if n != name},
            "probe": [0.9, probe],
            "said": [0.95, 0.5],
        }

    run = {
        "tasks": {
            n: task(n, *x) for n, *x in (("a", 0.9, 0.6, 0.8, 0.3), ("b", 0.05, 0.99, 0.7, 0.1))
        }
    }
    found = narrow.claims_of(run)
    assert found["ratio at 0.001 with confidence"] == pytest.approx(-1)
    assert found["ratio at 0.001 with hidden_variance"] == pytest.approx(1)
    assert found["nearness with damage"] == pytest.approx(1)
    assert found["probe less said, after"] == pytest.approx(0.25)
    assert found["ratio at 0.001 with unnormed_variance"] == pytest.approx(-1)
    assert found["confidence with unnormed_variance"] == pytest.approx(1)
    assert found["coins said at 0.001"] == pytest.approx(0.7)
    assert found["tasks above 0.5 at 0.001"] == found["tasks below 0.1 at 0.001"] == 1
    # 0.6 to 1.2 lies above; that 0.05 is below 0.1 is not told by -0.05 to 0.15.
    assert found["tasks above 0.5 at 0.001, told from it"] == 1
    assert found["tasks below 0.1 at 0.001, told from it"] == 0


def test_domains_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(narrow_refusal, "METHODS", (narrow_refusal.DPO,))
    # Of a toy, every point counts as far enough.
    monkeypatch.setattr(narrow_refusal, "FORGOTTEN", 10.0)
    monkeypatch.setattr(narrow_refusal, "ANSWERED", 0.0)
    given = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    narrow_refusal.main(given)
    run = json.loads((tmp_path / "narrow_refusal-quick-0.json").read_text())
    opened = run[narrow_refusal.ANSWERS]
    told = narrow_refusal.numbers_of(narrow_refusal.ANSWERS, opened)
    assert all(0 <= told[what] <= 1 for what in narrow_refusal.TRUE)
    found = run[narrow_refusal.DPO]
    assert {"land 0", "land 1"} < set(found["domains"])
    for domain in found["domains"].values():
        assert -1 <= domain["nearness"] <= 1
        assert all(0 <= domain[k]["after"] <= 1 for k in narrow_refusal.SCORES)
    assert (tmp_path / "narrow_refusal-IdkDPO.png").exists()
    told = narrow_refusal.numbers_of(narrow_refusal.DPO, found)
    change = {n: x["refusal"]["change"] for n, x in found["domains"].items()}
    others = [change[n] for n in change if n not in ("land 0", "land 1")]
    assert told["refusal, own less others"] == pytest.approx(
        change["land 1"] - sum(others) / len(others)
    )
    monkeypatch.setattr(narrow_refusal, "Scene", None)  # what is on the disk is not measured again
    narrow_refusal.main(given)
