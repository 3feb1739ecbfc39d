"""Numbers that judge any params, whichever method made them."""

from jedit.metrics.accuracy import accuracy
from jedit.metrics.forget_quality import forget_quality
from jedit.metrics.membership import MembershipAttack, membership_attack, membership_scores
from jedit.metrics.nll import answer_nll_per_row, nll
from jedit.metrics.output_kl import output_kl
from jedit.metrics.truth_ratio import truth_ratio
from jedit.metrics.unlearning_scores import UnlearningScores, average_gap, tug_of_war

__all__ = [
    "MembershipAttack",
    "UnlearningScores",
    "accuracy",
    "answer_nll_per_row",
    "average_gap",
    "forget_quality",
    "membership_attack",
    "membership_scores",
    "nll",
    "output_kl",
    "truth_ratio",
    "tug_of_war",
]
