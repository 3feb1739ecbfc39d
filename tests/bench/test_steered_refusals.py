"""The scripts of experts and of refusal tokens on toys: what they measure, not what they find."""

import json

import jax
import numpy as np
import pytest

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
    for group in ("moved", "answered"):
        assert np.all(np.diff([rate[group] for rate in rates]) <= 0)
    assert "| threshold of one region |" in capsys.readouterr().out
    monkeypatch.setattr(refusal_tokens, "measured", _refuse)
    refusal_tokens.main(arguments)


def _refuse(*_):
    raise AssertionError("what is on the disk is not measured again")
