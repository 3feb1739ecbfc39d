"""The evaluation log: open-unlearning's keys by its definitions, jedit's by jedit's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jedit import metrics
from jedit.data import QaRow
from jedit.recipes.tofu.evaluation import encode_questions
from jedit.recipes.tofu.log import against, aggregates
from jedit.recipes.tofu.membership import encode_answers, reference_of
from jedit.recipes.tofu.run import evaluate
from jedit.report import read_evaluation_log, write_evaluation_log
from tests.recipes.tofu.test_run import ROWS, loss_by_hand, model_and_params

__all__ = ["model_and_params"]  # a fixture

# All names in configs/eval/tofu_metrics but that of the gibberish classifier.
THEIRS = {
    *("model_utility", "forget_quality", "privleak", "forget_truth_ratio"),
    *("exact_memorization", "extraction_strength"),
    *(f"mia_{x}" for x in ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradnorm")),
    *(f"forget_Q_A_{x}" for x in ("Prob", "PARA_Prob", "PERT_Prob")),
    *(f"forget_Q_A_{x}" for x in ("ROUGE", "PARA_ROUGE", "PERT_ROUGE")),
    *(f"retain_Q_A_{x}" for x in ("Prob", "PARA_Prob", "PERT_Prob", "ROUGE")),
    *(f"{s}_Q_A_{x}" for s in ("ra", "wf") for x in ("Prob", "PERT_Prob", "Prob_normalised")),
    *(f"{s}_Q_A_ROUGE" for s in ("ra", "wf")),
    *(f"{s}_Truth_Ratio" for s in ("retain", "ra", "wf")),
}
CHOICE = [row._replace(paraphrased_answer=None) for row in ROWS]


@pytest.fixture(scope="module")
def logs(model_and_params):
    """What jedit measures of a model, its log, and that of the model that it is compared with."""
    model, params = model_and_params
    retrained = jax.tree.map(lambda x: jnp.asarray(1.5 * x, x.dtype), params)
    asked = {
        name: encode_questions(model, rows)
        for name, rows in (
            ("forget", ROWS),
            ("retain", ROWS),
            ("real_authors", CHOICE),
            ("world_facts", CHOICE),
        )
    }
    unseen = encode_answers(model, [QaRow("they are?", "I that, they"), QaRow("I know?", "he")])
    reference = reference_of(model, retrained, asked["forget"], unseen)
    (ours, log), (_, first) = (
        evaluate(model, p, asked, unseen, reference) for p in (params, retrained)
    )
    first |= against(first, first)
    return ours, log | against(log, first), first


def test_every_key_of_theirs_is_there_and_all_others_are_ours(logs):
    _, log, _ = logs
    assert set(log) >= THEIRS
    assert all(key.startswith("jedit_") for key in set(log) - THEIRS)


def test_probabilities_are_the_raw_ones_and_shares_stand_apart(logs, model_and_params):
    _, log, _ = logs
    model, params = model_and_params
    for i, row in enumerate(ROWS):
        right = loss_by_hand(model, params, row.question, row.answer)
        wrong = [loss_by_hand(model, params, row.question, w) for w in row.perturbed_answer]
        for short in ("ra", "forget"):
            rows = log[f"{short}_Q_A_Prob"].rows
            np.testing.assert_allclose(rows["avg_loss"][i], right, rtol=1e-4)
            np.testing.assert_allclose(rows["prob"][i], np.exp(-right), rtol=1e-4)
            pert = log[f"{short}_Q_A_PERT_Prob"].rows
            np.testing.assert_allclose(pert["avg_loss"][i], wrong, rtol=1e-4)
            np.testing.assert_allclose(pert["prob"][i], np.exp(np.negative(wrong)), rtol=1e-4)
        share = np.exp(-right) / (np.exp(-right) + np.exp(np.negative(wrong)).sum())
        np.testing.assert_allclose(log["ra_Q_A_Prob_normalised"].rows["prob"][i], share, rtol=1e-4)
        assert row.paraphrased_answer is not None
        said = loss_by_hand(model, params, row.question, row.paraphrased_answer)
        np.testing.assert_allclose(log["forget_Q_A_PARA_Prob"].rows["avg_loss"][i], said, rtol=1e-4)
        np.testing.assert_allclose(
            log["forget_truth_ratio"].rows["score"][i], np.exp(said - np.mean(wrong)), rtol=1e-4
        )
    for key in ("ra_Q_A_Prob", "wf_Q_A_PERT_Prob"):
        assert log[key].aggregate == pytest.approx(np.mean(log[key].rows["prob"]))


def test_rouge_rows_have_all_their_fields(logs):
    _, log, _ = logs
    for key, texts in (
        ("forget_Q_A_ROUGE", [row.answer for row in ROWS]),
        ("forget_Q_A_PARA_ROUGE", [row.paraphrased_answer for row in ROWS]),
    ):
        rows = log[key].rows
        found = metrics.rouge(texts, rows["generation"])
        assert set(rows) == {*found._fields, "input", "ground_truth", "generation"}
        assert rows["ground_truth"] == texts
        assert rows["input"] == [row.question for row in ROWS]
        for field, values in found._asdict().items():
            np.testing.assert_array_equal(rows[field], values)
        assert log[key].aggregate == pytest.approx(np.mean(found.rougeL_recall))
    rows = log["forget_Q_A_PERT_ROUGE"].rows
    assert np.shape(rows["rougeL_recall"]) == (3, 2)
    assert rows["ground_truth"][2] == ["he", "it is she"]
    assert rows["generation"][1][0] == rows["generation"][1][1]


def test_model_utility_is_the_harmonic_mean_of_their_nine(logs):
    ours, log, _ = logs
    nine = ["retain_Q_A_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised"]
    nine += [f"{s}_{x}" for s in ("retain", "ra", "wf") for x in ("Q_A_ROUGE", "Truth_Ratio")]
    values = [log[key].aggregate for key in nine]
    assert log["model_utility"].aggregate == pytest.approx(scipy.stats.hmean(values))
    assert log["jedit_model_utility"].aggregate == ours["model_utility"]
    assert log["jedit_mia_min_k"].aggregate == ours["mia_min_k"]
    assert "mia_gradient_norm" not in log


def test_a_log_serves_as_retain_model_logs(logs, tmp_path):
    """Read as open-unlearning reads it: scores row by row, and the AUC of one attack."""
    _, log, first = logs
    path = write_evaluation_log(first, tmp_path)
    reference = json.loads(path.read_text())
    scores = [row["score"] for row in reference["forget_truth_ratio"]["value_by_index"].values()]
    found = np.array(log["forget_truth_ratio"].rows["score"])
    p_value = scipy.stats.ks_2samp(found, np.array(scores)).pvalue
    assert log["forget_quality"].aggregate == pytest.approx(p_value)
    score, base = 1 - log["mia_min_k"].aggregate, 1 - reference["mia_min_k"]["agg_value"]
    expected = (score - base) / (base + 1e-10) * 100
    assert log["privleak"].aggregate == pytest.approx(expected)
    for part, number in (("forget", 3), ("holdout", 2)):
        assert list(reference["mia_min_k"][part]["value_by_index"]) == list(map(str, range(number)))
    assert set(read_evaluation_log(path)) == set(first)


def test_attacks_leave_the_last_token_out_where_theirs_do(logs, model_and_params):
    """Of "he", with its end token, one token is left, and Min-K% is that token's loss."""
    _, log, _ = logs
    model, params = model_and_params
    tokenizer = model.words.tokenizer
    prompt, answer = (tokenizer.encode(text).ids for text in ("I know?", " he"))
    tokens = jnp.asarray([[*prompt, *answer]], jnp.int32)
    log_p = np.asarray(jax.nn.log_softmax(model.apply(params, tokens)))[0]
    losses = [-log_p[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]
    number = max(1, int(0.4 * len(losses)))
    expected = np.mean(sorted(losses)[::-1][:number])
    scores = log["mia_min_k"].parts["holdout"].rows["score"]
    np.testing.assert_allclose(scores[1], expected, rtol=1e-4)
    assert not np.allclose(log["jedit_mia_min_k"].parts["holdout"].rows["score"], scores)


def test_aggregates_are_of_the_leaderboards_numbers(logs):
    ours, log, _ = logs
    paraphrased = log["forget_Q_A_PARA_Prob"].rows["prob"]
    ratios = log["jedit_forget_truth_ratio"].rows["score"]
    expected = [
        1 - ours["extraction_strength"],
        1 - ours["exact_memorization"],
        1 - np.mean(paraphrased),
        1 - np.mean(1 / (1 + ratios)),
    ]
    np.testing.assert_allclose(ours["memorization_score"], scipy.stats.hmean(expected), rtol=1e-6)
    assert log["jedit_memorization_score"].aggregate == ours["memorization_score"]
    attacks = {"mia_loss": 0.9, "mia_zlib": 0.6, "mia_min_k": 0.7, "mia_min_k_plus_plus": 0.5}
    retrained = dict.fromkeys(attacks, 0.5) | {"model_utility": 0.7}
    row = attacks | {"model_utility": 0.3, "memorization_score": 0.8}
    found = aggregates(row, attacks | {"model_utility": 0.6}, retrained)
    privacy = scipy.stats.hmean([0.2, 0.8, 0.6, 1.0])
    np.testing.assert_allclose(
        list(found.values()), [privacy, 0.5, scipy.stats.hmean([0.8, privacy, 0.5])]
    )
    assert list(found) == ["privacy_score", "utility_score", "overall_score"]
    assert list(aggregates(row, {"model_utility": 0.0}, retrained)) == ["privacy_score"]
    assert not aggregates(row, {"model_utility": 0.0}, retrained | {"mia_zlib": 0.0})
