"""Is what was forgotten gone, or only hidden? Attacks on any params, whichever method made them."""

from jedit.attacks.linear_probe import ProbeScores, linear_probe
from jedit.attacks.quantize import quantize
from jedit.attacks.relearn import Relearned, relearn
from jedit.attacks.relearning_curve import (
    Attacker,
    RelearningCurve,
    TaughtByShare,
    relearning_curve,
    taught_by_share,
)
from jedit.attacks.reword import in_other_words, with_prefix

__all__ = [
    "Attacker",
    "ProbeScores",
    "Relearned",
    "RelearningCurve",
    "TaughtByShare",
    "in_other_words",
    "linear_probe",
    "quantize",
    "relearn",
    "relearning_curve",
    "taught_by_share",
    "with_prefix",
]
