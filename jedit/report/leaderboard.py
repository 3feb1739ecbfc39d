"""The second table of a benchmark: every model at its best point, by every further metric."""

from typing import TYPE_CHECKING, NamedTuple

from jedit.report.results import Comparison
from jedit.report.table import Heading, Row, Sheet, number

if TYPE_CHECKING:
    from rich.table import Table


class Measure(NamedTuple):
    """One metric of the leaderboard, and how its column is headed.

    Attributes:
        heading: short heading, for a table.
        meaning: meaning in full, as a text.
        is_main: whether a narrow screen shows it.
        attack: description of what was done to the model, where the number is the probability of
            the forget answers under an attack that tries to bring them back.
    """

    heading: str
    meaning: str
    is_main: bool = False
    attack: str = ""


# jedit's metrics. In an evaluation log the names are open-unlearning's, as it defines them, and one
# of these that is defined in another way is "jedit_NAME" there.
KNOWN = "forget_Q_A_Prob"  # what the attacks try to raise
MEASURES = {
    "forget_quality": Measure(
        "forget\nquality", "p-value against the retrained model", is_main=True
    ),
    "model_utility": Measure(
        "model\nutility",
        "harmonic mean of nine, on all questions and not only those that chose",
        is_main=True,
    ),
    KNOWN: Measure("forget\nprob.", "probability of the forget answers, per token", is_main=True),
    "forget_Q_A_ROUGE": Measure("forget\nROUGE", "ROUGE-L recall of the forget answers"),
    "forget_truth_ratio": Measure("forget\nTR", "mean of min(TR, 1/TR) on the forget questions"),
    "exact_memorization": Measure("exact\nmem.", "share of forget tokens predicted right"),
    "extraction_strength": Measure("extr.\nstr.", "share of a forget answer that its start yields"),
    "depth_score": Measure(
        "depth",
        "share of the forget answers that is gone from the layers: 1 is the retrained model",
    ),
    "memorization_score": Measure("memo-\nrization", "harmonic mean of four; 1: none"),
    "privacy_score": Measure(
        "pri-\nvacy", "harmonic mean of four attacks' nearness to the retrained model; 1: the same"
    ),
    "utility_score": Measure("utility\nleft", "share of the original model's utility, 1 at most"),
    "overall_score": Measure("over-\nall", "harmonic mean of memorization, privacy and utility"),
    "privleak": Measure("Priv-\nLeak", "by Min-K%, in percent: 0 is the retrained model"),
    "mia_min_k": Measure("AUC\nMin-K", "of Min-K% between forget and never seen rows; 1/2: blind"),
    "mia_reference": Measure("AUC\nref.", "of the loss less the retrained model's; 1/2: blind"),
    "mia_gradient_norm": Measure("AUC\ngrad.", "of the gradient's norm; 1/2: blind"),
    "rounded_away": Measure(
        "rounded\naway", "share of the edit that its dtype took, in the parameter where it is most"
    ),
    "before_relearning": Measure(
        "before", "probability of five sixths of the forget answers, per token"
    ),
    "relearned_harmful": Measure(
        "relearnt\nharmful",
        "the same answers' after training on the other sixth",
        is_main=True,
        attack="training it again on a sixth of the forget rows",
    ),
    "relearned_benign": Measure(
        "relearnt\nbenign",
        "the same, trained on unrelated questions",
        attack="training it on unrelated questions",
    ),
    "reapplied": Measure("re-\napplied", "after harmful relearning and the same edit once more"),
    "quantized_8_bits": Measure(
        "8 bits",
        "probability of the forget answers, weights rounded",
        attack="rounding its weights to 8 bits",
    ),
    "quantized_4_bits": Measure(
        "4 bits", "the same, to 4 bits", attack="rounding its weights to 4 bits"
    ),
    "with_prefix": Measure(
        "pre-\nfixed",
        "the same, behind a prefix that asks for the truth",
        attack="a prefix that asks for the truth",
    ),
    "in_other_words": Measure(
        "other\nwords",
        "the same, the questions paraphrased",
        attack="asking in other words",
    ),
    "forget_recall": Measure(
        "forget\nR@10", "recall@10 of the choices to forget: how often among the first ten"
    ),
    "forget_ndcg": Measure("forget\nN@10", "NDCG@10 of the choices to forget", is_main=True),
    "forget_next_recall": Measure(
        "their\nnext R", "recall@10 of the same users' next choice, which no model has learnt"
    ),
    "forget_next_ndcg": Measure("their\nnext N", "NDCG@10 of the same"),
    "retain_next_recall": Measure(
        "others'\nnext R", "recall@10 of held-out users' next choice, which no model has learnt"
    ),
    "retain_next_ndcg": Measure("others'\nnext N", "NDCG@10 of the same", is_main=True),
    "probe_accuracy": Measure("probe", "how often a hidden state says which author is asked about"),
}


def leaderboard_sheet(comparison: Comparison) -> Sheet:
    """Lay out each model with every metric that was measured, the known metrics first."""
    given = {name for row in comparison.leaderboard.values() for name in row}
    names = [name for name in MEASURES if name in given] + sorted(given - set(MEASURES))
    unknown = {name: Measure(name.replace("_", "\n"), name) for name in given - set(MEASURES)}
    known = MEASURES | unknown
    headings = tuple(Heading(*known[name][:3]) for name in names)
    rows = (
        Row(model, "", tuple(number(numbers.get(name)) for name in names))
        for model, numbers in comparison.leaderboard.items()
    )
    return Sheet(headings, tuple(rows))


def leaderboard_table(comparison: Comparison) -> "Table":
    """Make the terminal's table of the metrics that have a short heading."""
    sheet = leaderboard_sheet(comparison)
    short = {measure.heading for measure in MEASURES.values()}
    shown = [i for i, heading in enumerate(sheet.headings) if heading.text in short]
    return sheet.only(shown).for_terminal(f"{comparison.title}: all metrics")
