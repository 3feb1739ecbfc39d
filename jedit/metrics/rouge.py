"""ROUGE of generated answers against the true ones (Lin, 2004), by the package rouge-score.

    ROUGE-1 recall   |words of the answer also in the generation| / |words of the answer|
    ROUGE-L recall   LCS(answer, generation) / |words of the answer|
    ROUGE-L F1       2PR / (P + R), P = LCS / |words of the generation|

LCS is the length of the longest common subsequence of words.  Words are lower-case runs of letters
a-z and digits, longer ones than three letters reduced to their Porter stem when `use_stemmer`.
Higher: nearer to the true answer.  Recall does not fall when a generation goes on and on: compare
it only at the same limit on new tokens.

TOFU (arXiv 2401.06121) reports ROUGE-L recall with stems, MUSE ROUGE-L F1 without (see `muse`).

Differences: none from TOFU; the per-row values in its authors' logs are reproduced to the last
digit.  open-unlearning stems also where it evaluates MUSE, which MUSE's own code does not.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Rouge(NamedTuple):
    """Overlaps of generated with true answers, one number per row, from 0 to 1, in float64.

    Attributes:
        rouge1_recall: share of the answer's words that the generation has, in any order.
        rougeL_recall: share of the answer's words that the generation has in the answer's order.
        rougeL_f1: harmonic mean of that recall and its precision, the share of the generation's
            words.
    """

    rouge1_recall: Float[np.ndarray, " n"]
    rougeL_recall: Float[np.ndarray, " n"]
    rougeL_f1: Float[np.ndarray, " n"]


def rouge(answers: Sequence[str], generations: Sequence[str], *, use_stemmer: bool = True) -> Rouge:
    """Return each row's ROUGE scores.

    Args:
        answers: the n true answers.
        generations: what the model wrote in their place, in the same order.
        use_stemmer: compare words by their Porter stems (TOFU: yes; MUSE: no).

    Returns:
        The scores; an answer or a generation without any word scores 0.

    Raises:
        ValueError: if there are not as many generations as answers, or one of them is a string.
        ImportError: rouge-score is not installed.
    """
    if isinstance(answers, str) or isinstance(generations, str):
        raise ValueError("expected two sequences of texts, got a string; put it in a list")
    if len(answers) != len(generations):
        raise ValueError(
            f"expected one generation per answer, got {len(generations)} for {len(answers)}"
        )
    scorer = _scorer()(["rouge1", "rougeL"], use_stemmer=use_stemmer)
    rows = [scorer.score(*pair) for pair in zip(answers, generations, strict=True)]
    return Rouge(
        np.array([row["rouge1"].recall for row in rows], np.float64),
        np.array([row["rougeL"].recall for row in rows], np.float64),
        np.array([row["rougeL"].fmeasure for row in rows], np.float64),
    )


def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError(
            "jedit.metrics.rouge needs the package rouge-score: pip install 'jedit[demo]'."
        ) from None
    return RougeScorer
