"""The script of the steering claims, on a toy."""

import jax
import numpy as np
import pytest

from tests.bench.claims import steering


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_settings_are_chosen_on_a_seed_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["steering", "--quick", "--seeds", "1", "--out", str(tmp_path)])
    steering.main()
    shown = capsys.readouterr().out
    # What is kept is found again at the settings of each, so that nothing is measured anew.
    record = steering.kept(
        tmp_path / "steering-quick-grid.json",
        steering.settings(*steering.CHOOSING, steering.QUICK_GRIDS, judged_by=3, is_quick=True),
        lambda: pytest.fail("anew"),
    )
    points = steering.chosen(record)
    first = steering.kept(
        tmp_path / "steering-quick-0.json",
        steering.settings(0, steering.WORDS[0], points, judged_by=2, is_quick=True),
        lambda: pytest.fail("anew"),
    )
    for name, found in first["methods"].items():
        assert f"| {name} | {points[name][0]} |" in shown
        assert [one["point"] for one in found] == points[name]
        assert all(one["is_reached"] == (abs(one["kl"] / 0.1 - 1) <= 0.01) for one in found)
        assert all(np.isfinite(one["share"]) == one["is_reached"] for one in found)
    assert any(one["is_reached"] for found in first["methods"].values() for one in found)
    assert first["methods"]["AUSteer"][0]["fold"] < 1e-4


def test_pairs_have_one_token_in_common():
    target = np.array([[1, 5, 7, 9], [1, 4, 9, 2], [1, 6, 9, 2]])
    source = np.array([[1, 2, 5, 8], [1, 5, 5, 4], [1, 4, 4, 2]])
    good, bad = steering.contrasted(target, np.array([2, 2, 2]), source)
    at = lambda rows: np.take_along_axis(  # noqa: E731
        np.asarray(rows.inputs), np.asarray(rows.mask).argmax(axis=1)[:, None], axis=1
    )
    assert at(good).tolist() == at(bad).tolist() == [[5], [4]]
    assert np.asarray(bad.mask).argmax(axis=1).tolist() == [1, 1]
    assert np.asarray(bad.inputs).tolist() == [source[1].tolist(), source[2].tolist()]


def test_a_point_beyond_the_price_is_not_chosen():
    points = [
        {"point": {"units": 1}, "is_reached": False, "share": 0.9},
        {"point": {"units": 3}, "is_reached": True, "share": 0.2},
        {"point": {"units": 9}, "is_reached": True, "share": 0.1},
    ]
    assert steering.chosen({"methods": {"AUSteer": points}}) == {"AUSteer": [{"units": 3}]}
