"""The scripts of experts and of refusal tokens on toys: what they measure, not what they find."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.steering import Decision
from tests.bench.claims import experts, refusal_tokens
from tests.bench.claims.refused_authors import refused_authors


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("by", ["author", "row"])
def test_what_is_held_out_is_apart_and_every_region_has_some(by):
    made = refused_authors(1, authors=24, facts=3, by=by)
    parts = [{row.question for row in part.rows} for part in (made.seen, made.heldout)]
    assert not parts[0] & parts[1]
    assert sum(map(len, parts)) == 72
    authors = [{row.fields["author"] for row in part.rows} for part in (made.seen, made.heldout)]
    assert bool(authors[0] & authors[1]) == (by == "row")
    for part in (made.seen, made.heldout):
        assert set(part.regions) == set(range(8))
        assert len(part.of([2])) + len(part.of([2], others=True)) == len(part.rows)


def test_experts_are_switched_and_judged(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    experts.main(arguments)
    (run,) = json.loads((tmp_path / "experts.json").read_text())["runs"]
    assert run["untouched"]["KL"] == pytest.approx(0, abs=1e-6)
    for name in (*experts.METHODS, "random"):
        for n in ("2", "10"):
            assert run[name][n]["KL"] > 0
            assert 0 <= run[name][n]["region refused"] <= 1
    least = run["at price"]["0.5"]["MoTE"]
    assert least <= run["untouched"]["region refused"]
    assert "| MoTE, 10 off |" in capsys.readouterr().out
    monkeypatch.setattr(experts, "measured", _refuse)
    experts.main(arguments)


def test_the_price_decides_which_numbers_count():
    points = {
        "1": {"KL": 0.05, "region refused": 0.6},
        "2": {"KL": 0.3, "region refused": 0.2},
        "4": {"KL": 0.09, "region refused": 0.7},
    }
    untouched = {"region refused": 0.9}
    assert experts.at_price(untouched, points, 0.1) == 0.6
    assert experts.at_price(untouched, points, 0.5) == 0.2
    assert experts.at_price(untouched, points, 0.01) == 0.9


def test_tokens_are_taught_and_decide(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    refusal_tokens.main(arguments)
    (run,) = json.loads((tmp_path / "refusal_tokens.json").read_text())["runs"]
    assert 0 <= run["curve"]["area"] <= 1
    rates = [run["separate"][f"{t:g}"] for t in refusal_tokens.THRESHOLDS]
    assert all(0 <= rate[group] <= 1 for rate in rates for group in ("moved", "other", "answered"))
    assert "| threshold of one region |" in capsys.readouterr().out
    monkeypatch.setattr(refusal_tokens, "measured", _refuse)
    refusal_tokens.main(arguments)


def test_a_decision_counts_as_what_is_written_behind_its_token():
    written = np.array([[True, False, True], [False, True, True], [False, True, False]])
    behind = lambda *categories: refusal_tokens.refused_by(  # noqa: E731
        Decision(jnp.zeros(3, int), jnp.array(categories)), written
    )
    assert behind(0, 0, 1).tolist() == [True, False, True]
    assert behind(1, -1, -1).tolist() == [False, True, False]
    asked = refusal_tokens.Asked([], np.array([4, 4, 7]), None, None)
    # One true positive is written by the sum 0.9, though 0.8 is sent to a refusal as well.
    probabilities = jnp.array([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.0, 0.1, 0.9]])
    plain = np.array([False, False, False])
    silent = np.array([[True, False, True], [False, False, True], [False, False, False]])
    found = refusal_tokens.against(asked, [4, 5], probabilities, silent, plain)
    assert found["threshold less without tokens"] == 0.5
    assert found["true positives at 1/2"] == 0.5
    assert found["false positives at 1/2"] == 0


def _refuse(*_):
    raise AssertionError("what is on the disk is not measured again")
