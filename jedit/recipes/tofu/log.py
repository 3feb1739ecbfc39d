"""One model's TOFU evaluation as open-unlearning logs it: its keys as it defines them, and ours.

    KEY          open-unlearning's metric of that name in `configs/eval/tofu_metrics`, with the
                 fields of its rows (`metrics.open_unlearning`: what it defines in its own way)
    jedit_KEY    jedit's metric of that name where it is another: what the leaderboard shows; and
                 the aggregates and the depth score, for which it has no metric in its logs

The retrained model's log serves as `retain_model_logs`.  Where runs differ: rows are numbered from
0 in the set that is asked; a generated answer may be as long as the run says, not 200 tokens; the
gradients of `mia_gradnorm` are taken of 40 rows of either set; `mia_reference` has the retrained
model for its reference; no classifier of gibberish is run.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, PyTree

from jedit import metrics
from jedit.metrics import SetUtility, open_unlearning
from jedit.recipes.tofu.evaluation import LanguageModel, Questions, SetScores
from jedit.recipes.tofu.membership import Answers, Scores, auc, spread
from jedit.recipes.tokenization import Words
from jedit.report import Evaluation

SHORT = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
ALIKE = ("loss", "zlib", "reference")  # attacks that are one and the same here and there
PRIVACY = ("loss", "zlib", "min_k", "min_k_plus_plus")  # those of the aggregate
Log = dict[str, Evaluation]


def set_log(name: str, words: Words, asked: Questions, found: SetScores) -> Log:
    """Log what is measured on one set of questions, whose name is a key of `SHORT`."""
    short = SHORT[name]
    answers = [row.answer for row in asked.rows]
    prompts = words.prompt_texts(asked.prompts)
    log = {
        f"{short}_Q_A_Prob": _probability(found.loss),
        f"{short}_Q_A_PERT_Prob": _probability(found.wrong_loss),
        f"{short}_Q_A_ROUGE": _rouge(answers, prompts, found.generations),
    }
    if asked.paraphrases is not None:
        log[f"{short}_Q_A_PARA_Prob"] = _probability(found.paraphrased_loss)
    if name in ("real_authors", "world_facts"):
        share = open_unlearning.normalized_probability(found.loss, found.wrong_loss)
        ours = metrics.normalized_probability(found.loss, found.wrong_loss)
        for key, values in ((short, share), (f"jedit_{short}", ours)):
            log[f"{key}_Q_A_Prob_normalised"] = Evaluation(float(np.mean(values)), {"prob": values})
    ratios = open_unlearning.truth_ratio(found.paraphrased_loss, found.wrong_loss)
    if name == "forget":
        near_one = open_unlearning.forget_truth_ratio(ratios)
        log["forget_truth_ratio"] = Evaluation(near_one, {"score": ratios})
        log["jedit_forget_truth_ratio"] = Evaluation(
            metrics.forget_truth_ratio(found.truth_ratio), {"score": found.truth_ratio}
        )
        others: dict[str, Sequence] = {
            "PERT": [row.perturbed_answer[: asked.num_wrong] for row in asked.rows]
        }
        if asked.paraphrases is not None:
            others["PARA"] = [row.paraphrased_answer or "" for row in asked.rows]
        for kind, texts in others.items():
            log[f"forget_Q_A_{kind}_ROUGE"] = _rouge(texts, prompts, found.generations)
    else:
        true_better = float(np.mean(np.maximum(0, 1 - ratios)))
        log[f"{short}_Truth_Ratio"] = Evaluation(true_better, {"score": ratios})
        log[f"jedit_{short}_Truth_Ratio"] = Evaluation(
            found.utility.truth_ratio, {"score": found.truth_ratio}
        )
    return log


def model_utility(log: Log) -> Evaluation:
    """Return the harmonic mean of nine of a log's metrics."""
    sets = []
    for short in ("retain", "ra", "wf"):
        kind = "Prob" if short == "retain" else "Prob_normalised"
        keys = (f"{short}_Q_A_{kind}", f"{short}_Q_A_ROUGE", f"{short}_Truth_Ratio")
        sets.append(SetUtility(*np.nan_to_num([log[key].aggregate or 0.0 for key in keys])))
    return Evaluation(metrics.model_utility(*sets))


def attack_log(
    model: LanguageModel,
    params: PyTree,
    answers: tuple[Answers, Answers],
    found: tuple[Scores, Scores],
) -> Log:
    """Log the attacks on known and unseen answers, and what the model has by heart of the known.

    Args:
        model: the language model's functions.
        params: the parameters of the model that is logged.
        answers: the known answers and the unseen ones.
        found: scores of jedit's attacks on the known and the unseen answers.
    """
    by_token = [open_unlearning.token_scores(model.apply, params, x.encoded) for x in answers]
    batches, taken = zip(*map(spread, answers), strict=True)
    norms = [open_unlearning.gradient_norms(model.apply, params, batch) for batch in batches]
    log = {
        "exact_memorization": _mean(by_token[0].exact_memorization),
        "extraction_strength": _mean(by_token[0].extraction_strength),
        "mia_min_k": _attack([x.min_k for x in by_token]),
        "mia_min_k_plus_plus": _attack([x.min_k_plus_plus for x in by_token]),
        "mia_gradnorm": _attack(norms, taken),
    }
    for name in found[0]:
        key = f"mia_{name}" if name in ALIKE else f"jedit_mia_{name}"
        log[key] = _attack([x[name] for x in found], taken if name == "gradient_norm" else None)
    for name, metric in (
        ("exact_memorization", metrics.exact_memorization),
        ("extraction_strength", metrics.extraction_strength),
    ):
        log[f"jedit_{name}"] = _mean(metric(model.apply, params, answers[0].encoded))
    return log


def against(log: Log, retrained: Log) -> Log:
    """Log what compares a model's log with that of the retrained model."""
    ratios = [np.nan_to_num(x["forget_truth_ratio"].rows["score"]) for x in (log, retrained)]
    aucs = [x["mia_min_k"].aggregate or 0.0 for x in (log, retrained)]
    return {
        "forget_quality": Evaluation(metrics.forget_quality(*ratios)),
        "privleak": Evaluation(open_unlearning.privleak(*aucs)),
    }


def aggregates(
    row: dict[str, float], original: dict[str, float], retrained: dict[str, float]
) -> dict[str, float]:
    """Return what of OpenUnlearning's aggregates compares a leaderboard's row with two others.

    What is left out would divide by zero: the privacy where the retrained model takes all forget
    rows for strangers, the utility where the original model has none, and the overall score then.
    """
    found = {}
    ours, theirs = ({name: x[f"mia_{name}"] for name in PRIVACY} for x in (row, retrained))
    if min(theirs.values()) > 0:
        found["privacy_score"] = metrics.privacy_score(ours, theirs)
    if original["model_utility"] > 0:
        found["utility_score"] = metrics.utility_score(
            row["model_utility"], original["model_utility"]
        )
    if len(found) == 2:
        found["overall_score"] = metrics.overall_score(row["memorization_score"], *found.values())
    return found


def _mean(scores: np.ndarray) -> Evaluation:
    return Evaluation(float(np.nanmean(scores)), {"score": scores})


def _attack(scores: Sequence[np.ndarray], index: Sequence | None = None) -> Evaluation:
    parts = {
        name: Evaluation(float(np.mean(values)), {"score": values}, rows)
        for name, values, rows in zip(
            ("forget", "holdout"), scores, index or (None, None), strict=True
        )
    }
    return Evaluation(auc(*scores), parts=parts)


def _probability(loss: Float[np.ndarray, "n *k"]) -> Evaluation:
    probability = np.exp(-loss)
    return Evaluation(float(np.mean(probability)), {"prob": probability, "avg_loss": loss})


def _rouge(answers: Sequence, prompts: list[str], generations: list[str]) -> Evaluation:
    """Log the ROUGE of one answer to each prompt, or of several."""
    if isinstance(answers[0], str):
        found = metrics.rouge(answers, generations)
        rows = {**found._asdict(), "input": prompts, "ground_truth": answers}
        rows["generation"] = generations
    else:
        number = len(answers[0])
        flat = [text for texts in answers for text in texts]
        each = np.repeat(np.arange(len(answers)), number)
        found = metrics.rouge(flat, [generations[i] for i in each])
        rows = {name: values.reshape(-1, number) for name, values in found._asdict().items()}
        rows |= {
            "input": [[text] * number for text in prompts],
            "ground_truth": [list(texts) for texts in answers],
            "generation": [[text] * number for text in generations],
        }
    return Evaluation(float(np.mean(found.rougeL_recall)), rows)
