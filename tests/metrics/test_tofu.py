"""TOFU's numbers: by hand, and recomputed from its authors' own evaluation logs.

The logs hold every row's losses, answers and generations, so that all TOFU reports can be computed
from them: here by jedit's functions, and once more by NumPy and SciPy on whole arrays.
"""

import builtins
import json

import numpy as np
import pytest
import scipy.stats

from jedit import metrics
from jedit.metrics import SetUtility

RUNS = {
    "llama2-7b": "ft_epoch5_lr1e-05_llama2-7b_{}_wd0.01.eval_log_aggregated.json",
    "phi": "ft_epoch5_lr2e-05_phi_{}_wd0.01.eval_log_aggregated.json",
}
SETS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}


@pytest.fixture(scope="module")
def logs(shared_data):
    folder = shared_data / "tofu_reference_eval"
    if not folder.is_dir():
        pytest.skip(f"needs TOFU's evaluation logs: {folder} is absent")
    return {
        (model, split): json.loads((folder / name.format(split)).read_text())
        for model, name in RUNS.items()
        for split in ("full", "retain90")
    }


def column(part, name):
    return np.array(list(part[name].values()))


def texts(part):
    """Answers and generations; the log has (question, generation, answer) per row."""
    rows = part["generated_text"].values()
    return [row[2] for row in rows], [row[1] for row in rows]


def ratios(part):
    return metrics.truth_ratio(
        column(part, "avg_paraphrased_loss"), column(part, "average_perturb_loss")
    )


def utility_of(part, *, is_normalized):
    """One set's three numbers, all recomputed by jedit from losses and texts."""
    loss, wrong = column(part, "avg_gt_loss"), column(part, "average_perturb_loss")
    return metrics.set_utility(
        metrics.normalized_probability(loss, wrong)
        if is_normalized
        else metrics.answer_probability(loss),
        metrics.rouge(*texts(part)).rougeL_recall,
        ratios(part),
    )


def reference_of(part, *, is_normalized):
    """The same three as TOFU's aggregation defines them, in probabilities."""
    p = np.exp(-column(part, "avg_gt_loss"))
    p_wrong = np.exp(-column(part, "average_perturb_loss"))
    if is_normalized:
        p = p / np.concatenate([p[:, None], p_wrong], axis=1).sum(1)
    p_paraphrased = np.exp(-column(part, "avg_paraphrased_loss"))
    right_over_wrong = p_paraphrased / scipy.stats.gmean(p_wrong, axis=1)
    knows = np.mean(np.clip(1 - 1 / right_over_wrong, 0, None))
    return p.mean(), column(part, "rougeL_recall").mean(), knows


# By `reference_of` and SciPy's harmonic mean; the KS test of llama2-7b is in test_metrics.py too.
UTILITY = {
    ("llama2-7b", "full"): 0.6226773637427152,
    ("llama2-7b", "retain90"): 0.613744995233942,
    ("phi", "full"): 0.5220737132035151,
    ("phi", "retain90"): 0.5319909117798324,
}
QUALITY = {"llama2-7b": 1.834066410994743e-21, "phi": 2.1942743021891237e-16}
# Mean probability, ROUGE-L recall and min(TR, 1 / TR) of the forget questions.
FORGET = {
    ("llama2-7b", "full"): (0.9909385566403208, 0.985449693916369, 0.5159854212808593),
    ("llama2-7b", "retain90"): (0.1475628122566954, 0.40824361952231664, 0.6740192657877031),
    ("phi", "full"): (0.9282394842423188, 0.9248612622630048, 0.48335558566802284),
    ("phi", "retain90"): (0.1349069615867286, 0.4278674282179278, 0.6288417132144549),
}


@pytest.mark.parametrize(("model", "split"), UTILITY)
def test_model_utility_of_the_logs(logs, model, split):
    log = logs[model, split]
    nine, sets = [], {}
    for name in ("retain", "real_authors", "world_facts"):
        kind = {"is_normalized": name != "retain"}
        sets[name] = utility_of(log[SETS[name]], **kind)
        reference = reference_of(log[SETS[name]], **kind)
        np.testing.assert_allclose(sets[name], reference, rtol=1e-12, err_msg=name)
        nine += reference
    utility = metrics.model_utility(**sets)
    np.testing.assert_allclose(utility, scipy.stats.hmean(nine), rtol=1e-12)
    np.testing.assert_allclose(utility, UTILITY[model, split], rtol=1e-12)


@pytest.mark.parametrize(("model", "split"), FORGET)
def test_the_forget_questions_of_the_logs(logs, model, split):
    part = logs[model, split][SETS["forget"]]
    found = (
        metrics.answer_probability(column(part, "avg_gt_loss")).mean(),
        metrics.rouge(*texts(part)).rougeL_recall.mean(),
        metrics.forget_truth_ratio(ratios(part)),
    )
    np.testing.assert_allclose(found, FORGET[model, split], rtol=1e-12)
    right_over_wrong = 1 / ratios(part)
    folded = np.minimum(right_over_wrong, 1 / right_over_wrong).mean()
    np.testing.assert_allclose(found[2], folded, rtol=1e-12)


@pytest.mark.parametrize("model", QUALITY)
def test_forget_quality_of_the_logs(logs, model):
    parts = [logs[model, split][SETS["forget"]] for split in ("full", "retain90")]
    quality = metrics.forget_quality(*map(ratios, parts))
    np.testing.assert_allclose(quality, QUALITY[model], rtol=1e-9)
    # The authors test the reciprocals: the order turns round, the two distributions stay as far.
    reciprocal = metrics.forget_quality(*(1 / ratios(part) for part in parts))
    np.testing.assert_allclose(reciprocal, quality, rtol=1e-9)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("model", RUNS)
def test_every_row_of_the_logs(logs, model, name):
    """Truth ratios were written in the logs in float32, the rest is theirs to the last digits."""
    for split in ("full", "retain90"):
        part = logs[model, split][SETS[name]]
        np.testing.assert_allclose(ratios(part), column(part, "truth_ratio"), rtol=2e-6)
        scores = metrics.rouge(*texts(part))
        np.testing.assert_allclose(scores.rouge1_recall, column(part, "rouge1_recall"), rtol=1e-12)
        np.testing.assert_allclose(scores.rougeL_recall, column(part, "rougeL_recall"), rtol=1e-12)
        if name in ("real_authors", "world_facts"):
            share = metrics.normalized_probability(
                column(part, "avg_gt_loss"), column(part, "average_perturb_loss")
            )
            np.testing.assert_allclose(-np.log(share), column(part, "normalized_gt_loss"), 1e-12)


def test_probabilities_by_hand():
    loss = np.log([2.0, 4.0, 1.0])
    np.testing.assert_allclose(metrics.answer_probability(loss), [0.5, 0.25, 1.0], rtol=1e-12)
    assert metrics.answer_probability([np.inf]) == [0.0]
    # 1/2 of 1/2 + 1/4 + 1/4; 1/4 of 1/4 + 1 + 1/4.
    share = metrics.normalized_probability(loss[:2], np.log([[4.0, 4.0], [1.0, 4.0]]))
    np.testing.assert_allclose(share, [0.5, 1 / 6], rtol=1e-12)


def test_a_share_is_of_what_is_left_however_little_that_is():
    """A collapsed model: exp(-60) and less, where 1e-10 in the denominator would give 0."""
    share = metrics.normalized_probability([60.0, 2000.0], [[60.0, 60.0], [2000.0, np.inf]])
    np.testing.assert_allclose(share, [1 / 3, 1 / 2], rtol=1e-12)
    assert np.isnan(metrics.normalized_probability([np.inf], [[np.inf]]))


def test_rouge_by_hand():
    answers = ["The cats sat on the mat.", "Jaime Vasquez", "", "one two"]
    generations = ["On the mat sat a cat", "jaime's book: VASQUEZ!", "anything", ""]
    scores = metrics.rouge(answers, generations)
    # the, cat(s), sat, on, the, mat: five of six (one "the" too few), "on the mat" in order.
    np.testing.assert_allclose(scores.rouge1_recall, [5 / 6, 1, 0, 0], rtol=1e-12)
    np.testing.assert_allclose(scores.rougeL_recall, [3 / 6, 1, 0, 0], rtol=1e-12)
    # Precisions 3/6 and 2/4 (jaime, s, book, vasquez).
    np.testing.assert_allclose(scores.rougeL_f1, [1 / 2, 2 / 3, 0, 0], rtol=1e-12)
    unstemmed = metrics.rouge(answers, generations, use_stemmer=False)
    np.testing.assert_allclose(unstemmed.rouge1_recall, [4 / 6, 1, 0, 0], rtol=1e-12)
    assert metrics.rouge([], []).rougeL_f1.shape == (0,)


def test_model_utility_by_hand():
    sets = [SetUtility(*row) for row in ([0.5, 1.0, 0.25], [0.2, 0.5, 1.0], [1.0, 0.4, 0.1])]
    # 2 + 1 + 4, 5 + 2 + 1, 1 + 2.5 + 10.
    assert metrics.model_utility(*sets) == pytest.approx(9 / 28.5, rel=1e-12)
    assert metrics.model_utility(*sets[:2], SetUtility(0.0, 0.4, 0.1)) == 0
    utility = metrics.set_utility([0.2, 0.4], [1.0, 0.0, 0.5], [0.25, 3.0, 1.0, 0.0])
    np.testing.assert_allclose(utility, [0.3, 0.5, (0.75 + 1) / 4], rtol=1e-12)
    # 1/4, 1/2, 1 and twice 0: a fact known for certain, one known to be otherwise.
    folded = metrics.forget_truth_ratio([0.25, 2.0, 1.0, 0.0, np.inf])
    assert folded == pytest.approx(1.75 / 5, rel=1e-12)


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match=r"expected losses of shape \(n,\), got \(2, 2\)"):
        metrics.answer_probability(np.zeros((2, 2)))
    for bad in (np.zeros((3, 2)), np.zeros(2), np.zeros((2, 0))):
        with pytest.raises(ValueError, match=r"expected losses of shapes \(n,\) and \(n, k\)"):
            metrics.normalized_probability(np.zeros(2), bad)
    with pytest.raises(ValueError, match="expected one generation per answer, got 1 for 2"):
        metrics.rouge(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="got a string; put it in a list"):
        metrics.rouge("a", ["a"])
    for bad in ([], [[0.5]], [np.nan], [-0.1]):
        with pytest.raises(ValueError, match="truth_ratio must be numbers of shape"):
            metrics.set_utility([0.5], [0.5], bad)
        with pytest.raises(ValueError, match="truth_ratio must be numbers of shape"):
            metrics.forget_truth_ratio(bad)
    good = SetUtility(0.5, 0.5, 0.5)
    for number in (np.nan, -0.5, np.inf):
        with pytest.raises(ValueError, match="the nine numbers must be finite and at least 0"):
            metrics.model_utility(good, good, good._replace(rouge=number))


def test_a_missing_package_is_named(monkeypatch):
    real_import = builtins.__import__

    def without_rouge(name, *args, **kwargs):
        if name.startswith("rouge_score"):
            raise ImportError(name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rouge)
    with pytest.raises(ImportError, match=r"needs the package rouge-score: pip install 'jedit\[de"):
        metrics.rouge(["a"], ["a"])
