"""Evaluation logs: open-unlearning's schema to the letter, there and back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jedit import metrics
from jedit.report import Evaluation, read_evaluation_log, write_evaluation_log


@pytest.fixture
def evaluations():
    return {
        "forget_truth_ratio": Evaluation(0.5, {"score": np.array([0.25, 2.0, 0.5])}),
        "forget_Q_A_PERT_Prob": Evaluation(
            0.4, {"prob": jnp.array([[0.5, 0.25]] * 3), "avg_loss": [[0.5, 1.5]] * 3}
        ),
        "retain_Q_A_ROUGE": Evaluation(
            1.0,
            {"rougeL_recall": [1.0, 1.0], "generation": ["été", 'said "no"']},
            index=np.array([7, 3]),
        ),
        "model_utility": Evaluation(0.61),
        "mia_min_k": Evaluation(
            0.75,
            parts={
                "forget": Evaluation(1.5, {"score": [1.0, 2.0]}),
                "holdout": Evaluation(3.0, {"score": [3.0]}),
            },
        ),
    }


def test_the_file_has_the_schema(evaluations, tmp_path):
    path = write_evaluation_log(evaluations, tmp_path / "new" / "evals")
    assert path == tmp_path / "new" / "evals" / "TOFU_EVAL.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "forget_Q_A_PERT_Prob": {
            "agg_value": 0.4,
            "value_by_index": {
                name: {"prob": [0.5, 0.25], "avg_loss": [0.5, 1.5]} for name in ("0", "1", "2")
            },
        },
        "forget_truth_ratio": {
            "agg_value": 0.5,
            "value_by_index": {"0": {"score": 0.25}, "1": {"score": 2.0}, "2": {"score": 0.5}},
        },
        "mia_min_k": {
            "agg_value": 0.75,
            "forget": {
                "agg_value": 1.5,
                "value_by_index": {"0": {"score": 1.0}, "1": {"score": 2.0}},
            },
            "holdout": {"agg_value": 3.0, "value_by_index": {"0": {"score": 3.0}}},
        },
        "model_utility": {"agg_value": 0.61},
        "retain_Q_A_ROUGE": {
            "agg_value": 1.0,
            "value_by_index": {
                "7": {"rougeL_recall": 1.0, "generation": "été"},
                "3": {"rougeL_recall": 1.0, "generation": 'said "no"'},
            },
        },
    }
    assert sorted(json.loads(path.read_text())) == list(json.loads(path.read_text()))
    summary = json.loads((path.parent / "TOFU_SUMMARY.json").read_text())
    assert summary == {name: one.aggregate for name, one in sorted(evaluations.items())}
    assert len(list(path.parent.iterdir())) == 2  # no temporary file is left


def test_what_was_written_is_read(evaluations, tmp_path):
    found = read_evaluation_log(write_evaluation_log(evaluations, tmp_path, name="MUSE"))
    assert (tmp_path / "MUSE_EVAL.json").is_file()
    assert set(found) == set(evaluations)
    for name, written in evaluations.items():
        assert found[name].aggregate == written.aggregate
        assert set(found[name].rows) == set(written.rows)
        assert set(found[name].parts) == set(written.parts)
        for field, values in written.rows.items():
            np.testing.assert_array_equal(found[name].rows[field], np.asarray(values))
    assert found["retain_Q_A_ROUGE"].index == [7, 3]
    assert found["forget_truth_ratio"].rows["score"].dtype == np.float64
    np.testing.assert_array_equal(found["mia_min_k"].parts["forget"].rows["score"], [1, 2])


def test_a_log_is_a_reference_for_forget_quality(tmp_path):
    """As open-unlearning reads it: the row's "score", whatever the order of metrics."""
    rng = np.random.default_rng(0)
    ours, retrained = rng.random((2, 40))
    path = write_evaluation_log({"forget_truth_ratio": Evaluation(0.5, {"score": ours})}, tmp_path)
    rows = json.loads(path.read_text())["forget_truth_ratio"]["value_by_index"].values()
    theirs = np.array([row["score"] for row in rows])
    np.testing.assert_array_equal(theirs, ours)
    stored = read_evaluation_log(path)["forget_truth_ratio"].rows["score"]
    quality = metrics.forget_quality(stored, retrained)
    assert quality == metrics.forget_quality(ours, retrained)


def test_what_is_not_finite_is_null_and_comes_back_as_nan(tmp_path):
    rows = {"score": [1.0, np.inf, np.nan], "loss": np.array([[1, -np.inf]] * 3, np.float32)}
    broken = {"a": Evaluation(np.inf, rows), "b": Evaluation(None), "c": Evaluation(2.0)}
    path = write_evaluation_log(broken, tmp_path)
    assert "Infinity" not in path.read_text()
    assert "NaN" not in path.read_text()
    log = json.loads(path.read_text())
    assert log["a"]["agg_value"] is None
    assert log["a"]["value_by_index"]["1"] == {"score": None, "loss": [1.0, None]}
    assert json.loads((tmp_path / "TOFU_SUMMARY.json").read_text()) == {"c": 2.0}
    found = read_evaluation_log(path)
    assert np.isnan(found["a"].aggregate)
    assert np.isnan(found["b"].aggregate)
    np.testing.assert_array_equal(found["a"].rows["score"], [1, np.nan, np.nan])
    np.testing.assert_array_equal(found["a"].rows["loss"], [[1, np.nan]] * 3)


def test_a_log_of_theirs_is_read(tmp_path):
    """Rows that are null, fields that some rows lack, and keys that are no part of the schema."""
    theirs = {
        "mia_loss": {
            "forget": {"agg_value": 1.0, "value_by_index": {"4": {"score": 1}, "9": None}},
            "auc": 0.5,
            "agg_value": 0.5,
        },
        "rouge": {"agg_value": 1, "value_by_index": {"0": {"input": "a"}, "1": {"rougeL_f1": 0.5}}},
    }
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(theirs))
    found = read_evaluation_log(path)
    assert set(found["mia_loss"].parts) == {"forget"}
    forget = found["mia_loss"].parts["forget"]
    assert forget.index == [4, 9]
    np.testing.assert_array_equal(forget.rows["score"], [1, np.nan])
    assert found["rouge"].rows["input"] == ["a", None]
    np.testing.assert_array_equal(found["rouge"].rows["rougeL_f1"], [np.nan, 0.5])


def test_an_old_log_is_replaced_or_kept_whole(evaluations, tmp_path):
    path = write_evaluation_log(evaluations, tmp_path)
    before = path.read_bytes()
    bad = {**evaluations, "x": Evaluation(0.1, {"a": [1.0], "b": [1.0, 2.0]})}
    with pytest.raises(ValueError, match=r"x: 1 names of rows, but rows of fields \{'a': 1, 'b'"):
        write_evaluation_log(bad, tmp_path)
    assert path.read_bytes() == before
    write_evaluation_log({"model_utility": Evaluation(0.2)}, tmp_path)
    assert list(read_evaluation_log(path)) == ["model_utility"]


def test_bad_logs_get_a_sentence(tmp_path):
    row = {"score": [1.0, 2.0]}
    with pytest.raises(ValueError, match="a: 1 names of rows, but rows of fields"):
        write_evaluation_log({"a": Evaluation(1.0, row, index=[3])}, tmp_path)
    with pytest.raises(ValueError, match="a: a row's name stands twice in its index"):
        write_evaluation_log({"a": Evaluation(1.0, row, index=[3, 3])}, tmp_path)
    with pytest.raises(ValueError, match="a: a part may not be named 'agg_value' or"):
        write_evaluation_log({"a": Evaluation(1.0, parts={"agg_value": Evaluation(1.0)})}, tmp_path)
    for text, said in (("{", "is not JSON"), ("[]", "expected one object"), ('{"a": 1}', "'agg_v")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=rf"x\.json: .*{said}"):
            read_evaluation_log(tmp_path / "x.json")


@pytest.mark.parametrize(
    "entry",
    [
        {"agg_value": {"x": 1}},
        {"value_by_index": {"0": 0.5}},
        {"value_by_index": {"a": {"score": 0.5}}},
        {"value_by_index": [1]},
    ],
)
def test_a_malformed_entry_is_refused_by_name(tmp_path, entry):
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps({"metric": entry}))
    with pytest.raises(ValueError, match="TOFU_EVAL.json: an aggregate must be"):
        read_evaluation_log(path)
