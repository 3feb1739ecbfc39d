"""Sweeps: each run once, broken-off ones go on, what is something else's is refused, intervals."""

import json

import numpy as np
import pytest
from scipy import stats

from jedit.metrics import membership_auc
from jedit.recipes.sweep import (
    Found,
    Measured,
    Sheet,
    Trial,
    check_out,
    compared,
    finish,
    folder_hash,
    mean_over,
    summary,
    sweep,
)

TRIALS = [
    Trial("untouched", {}, 0),
    *(Trial("NPO", {"beta": beta, "steps": 2}, seed) for seed in (0, 1, 2) for beta in (0.1, 0.5)),
]
ABOUT = {"benchmark": "toy", "model": "abc", "looks": (1, 2)}


class Runs:
    """Counts edits, and stops at one of them as a killed process does."""

    def __init__(self, stop=None):
        self.made, self.stop = [], stop

    def edit(self, trial):
        if len(self.made) == self.stop:
            raise KeyboardInterrupt
        self.made.append(trial)
        return np.float64(trial.seed + trial.point.get("beta", 0.0))

    def evaluate(self, params):
        return Found({"score": Measured(float(params)), "odd": mean_over([1.0, np.nan])}, ["said"])

    def __call__(self, out, about=ABOUT, trials=TRIALS):
        how = {"edit": self.edit, "evaluate": self.evaluate, "say": lambda _: None}
        return sweep(trials, out, about, **how)


def test_a_killed_sweep_goes_on_at_the_next_run(tmp_path):
    first, second = Runs(stop=4), Runs()
    with pytest.raises(KeyboardInterrupt):
        first(tmp_path)
    records = second(tmp_path)
    assert first.made + second.made == TRIALS
    assert len(list((tmp_path / "runs").iterdir())) == len(TRIALS)
    assert [(r["method"], r["point"], r["seed"]) for r in records] == [tuple(t) for t in TRIALS]
    whole = Runs()(tmp_path / "at once")
    assert [r["numbers"] for r in whole] == [r["numbers"] for r in records]
    assert {"jax", "jedit"} < set(records[0]["versions"])
    assert records[0]["about"]["looks"] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no record of a run; remove it"),
        ("[1]", "is no record of a run"),
        ('{"method": "NPO"}', "is no record of a run"),
        ({"seed": 7}, "is no record of a run"),
        ({"numbers": {"score": {"value": "x", "low": None, "high": None}}}, "is no record"),
        ({"about": {"benchmark": "toy", "model": "other", "looks": [1, 2]}}, "with another model;"),
    ],
)
def test_a_file_of_something_else_is_refused(content, message, tmp_path):
    Runs()(tmp_path)
    file = tmp_path / "runs" / f"{TRIALS[1].name}.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file.name}: .*{message}"):
        Runs()(tmp_path)


def test_intervals_over_seeds_are_students(tmp_path):
    records = Runs()(tmp_path)
    sheet = Sheet("Toy", {"how | much": "score", "undefined": "odd", "absent": "none"})
    ((title, lines),) = finish(tmp_path, "A toy", ABOUT, records, [sheet], ["A note."])
    assert (title, lines[0]) == ("Toy", ["model", "point", "how | much", "undefined", "edit s"])
    assert [line[:4] for line in lines[1:]] == [
        ["untouched", "", "0", "–"],
        ["NPO", "beta 0.1, steps 2", "1.10 [-1.38, 3.58]", "–"],
        ["NPO", "beta 0.5, steps 2", "1.50 [-0.984, 3.98]", "–"],
    ]
    low, high = stats.t.interval(0.95, 2, 1.1, stats.sem([0.1, 1.1, 2.1]))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["summary"][1]["numbers"]["score"] == pytest.approx(
        {"value": 1.1, "low": low, "high": high}
    )
    assert sorted(found["runs"]) == sorted(f"runs/{t.name}.json" for t in TRIALS)
    text = (tmp_path / "table.md").read_text()
    assert "3 seeds" in text
    assert "| how \\| much |" in text
    check_out(tmp_path)


def test_intervals_over_rows():
    scores = np.random.default_rng(0).normal(3.0, 1.0, 200)
    found = mean_over(scores)
    half = 1.96 * scores.std() / np.sqrt(200)
    assert found == pytest.approx((scores.mean(), scores.mean() - half, scores.mean() + half), 0.02)
    assert mean_over([0.0, 0.0]) == (0.0, None, None)
    assert mean_over([]) == mean_over([np.nan]) == (None, None, None)
    first, second = scores[:100], scores[100:] + 1.0
    auc = compared(membership_auc, first, second)
    # Hanley and McNeil's standard error of an area.
    a = auc.value
    q, r = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 99 * (q - a * a) + 99 * (r - a * a)) / 100**2)
    assert auc == pytest.approx((a, a - 1.96 * error, a + 1.96 * error), 0.03)
    assert a == pytest.approx(np.mean(first[:, None] < second[None]))
    # Sets that lie wholly apart are not certain of others.
    assert compared(membership_auc, first, first + 100.0) == (1.0, None, None)


def test_seeds_that_are_alike_have_no_interval():
    records = [
        {"method": "NPO", "point": {}, "seed": seed, "seconds": {"edit": 1.0}}
        | {"numbers": {"score": Measured(1.0)._asdict()}}
        for seed in (0, 1)
    ]
    assert summary(records)[0]["numbers"]["score"] == Measured(1.0)._asdict()


def test_what_is_chosen_says_its_own_seeds(tmp_path):
    records = Runs()(tmp_path, trials=TRIALS[:5])
    chosen = [records[0], records[-1]]
    finish(tmp_path, "A toy", ABOUT, records, [Sheet("Toy", {"score": "score"})], (), chosen)
    text = (tmp_path / "table.md").read_text()
    assert "Means of 2 seeds" in text
    assert "Chosen: One seed, 1;" in text


def test_one_run_given_twice_is_made_once(tmp_path):
    runs = Runs()
    assert len(runs(tmp_path, trials=[*TRIALS, *TRIALS])) == len(TRIALS)
    assert runs.made == TRIALS


def test_a_folder_is_known_by_what_decides_its_outputs(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    before = folder_hash(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert folder_hash(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"weighty")
    assert folder_hash(tmp_path) != before
    before = folder_hash(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert folder_hash(tmp_path) != before


def test_what_a_killed_run_left_does_not_stop_the_next(tmp_path):
    (tmp_path / ".models.abc").mkdir()
    (tmp_path / ".results.json.new").write_text("{")
    check_out(tmp_path)


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds files that no such run has written \(thesis.tex"):
        check_out(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        check_out(tmp_path / "thesis.tex")
