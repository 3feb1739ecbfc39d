"""Numbers that judge any params, whichever method made them."""

from jedit.metrics.accuracy import accuracy
from jedit.metrics.forget_quality import forget_quality
from jedit.metrics.nll import answer_nll_per_row, nll
from jedit.metrics.output_kl import output_kl
from jedit.metrics.truth_ratio import truth_ratio

__all__ = [
    "accuracy",
    "answer_nll_per_row",
    "forget_quality",
    "nll",
    "output_kl",
    "truth_ratio",
]
