"""The second table of a benchmark: every model at its best point, by every further metric."""

from typing import NamedTuple

from rich.table import Table

from jedit.report.results import Comparison
from jedit.report.table import number


class Measure(NamedTuple):
    """A column: a short heading and what it is in full."""

    heading: str
    meaning: str


# jedit's metrics. In an evaluation log the names are open-unlearning's, as it defines them, and one
# of these that is defined in another way is "jedit_NAME" there.
MEASURES = {
    "forget_quality": Measure("forget\nquality", "p-value against the retrained model"),
    "model_utility": Measure(
        "model\nutility", "harmonic mean of nine, on all questions and not only those that chose"
    ),
    "forget_Q_A_Prob": Measure("forget\nprob.", "probability of the forget answers, per token"),
    "forget_Q_A_ROUGE": Measure("forget\nROUGE", "ROUGE-L recall of the forget answers"),
    "forget_truth_ratio": Measure("forget\nTR", "mean of min(TR, 1/TR) on the forget questions"),
    "exact_memorization": Measure("exact\nmem.", "share of forget tokens predicted right"),
    "extraction_strength": Measure("extr.\nstr.", "share of a forget answer that its start yields"),
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
        "relearnt\nharmful", "the same answers' after training on the other sixth"
    ),
    "relearned_benign": Measure("relearnt\nbenign", "the same, trained on unrelated questions"),
    "reapplied": Measure("re-\napplied", "after harmful relearning and the same edit once more"),
    "quantized_8_bits": Measure("8 bits", "probability of the forget answers, weights rounded"),
    "quantized_4_bits": Measure("4 bits", "the same, to 4 bits"),
    "with_prefix": Measure("pre-\nfixed", "the same, behind a prefix that asks for the truth"),
    "in_other_words": Measure("other\nwords", "the same, the questions paraphrased"),
    "probe_accuracy": Measure("probe", "how often a hidden state says which author is asked about"),
}


def leaderboard_columns(comparison: Comparison) -> list[str]:
    """The metrics that were measured, the known ones first."""
    given = {name for row in comparison.leaderboard.values() for name in row}
    return [name for name in MEASURES if name in given] + sorted(given - set(MEASURES))


def leaderboard_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Each model with the text of its cells."""
    columns = leaderboard_columns(comparison)
    return [
        (name, [number(row.get(column)) for column in columns])
        for name, row in comparison.leaderboard.items()
    ]


def leaderboard_table(comparison: Comparison) -> Table:
    """The table for the terminal, with the metrics that have a short heading."""
    columns = leaderboard_columns(comparison)
    shown = [i for i, name in enumerate(columns) if name in MEASURES]
    table = Table(title=f"{comparison.title}: all metrics", title_justify="left")
    table.add_column("model", no_wrap=True)
    for i in shown:
        table.add_column(MEASURES[columns[i]].heading, justify="right", no_wrap=True)
    for name, cells in leaderboard_rows(comparison):
        table.add_row(name, *(cells[i] for i in shown), end_section=name == "retrained")
    return table
