"""Forget and retain losses, one file each.

Each is `(params, forget, retain, *, apply, ...) -> (scalar, aux)`; `functools.partial`
fixes `apply` and whatever else there is.
"""

from jedit.objectives.ce_u import ce_u
from jedit.objectives.dpo import dpo
from jedit.objectives.ga import ga
from jedit.objectives.graddiff import graddiff
from jedit.objectives.npo import npo, npo_from_nll
from jedit.objectives.random_label import random_label, relabel
from jedit.objectives.representation_deviation import representation_deviation
from jedit.objectives.retain import retain_kl, retain_nll
from jedit.objectives.rmu import random_direction, rmu
from jedit.objectives.simnpo import simnpo
from jedit.objectives.token_nll import sequence_nll, token_kl, token_nll
from jedit.objectives.undial import undial
from jedit.objectives.weighted_ascent import satimp, wga

__all__ = [
    "ce_u",
    "dpo",
    "ga",
    "graddiff",
    "npo",
    "npo_from_nll",
    "random_direction",
    "random_label",
    "relabel",
    "representation_deviation",
    "retain_kl",
    "retain_nll",
    "rmu",
    "satimp",
    "sequence_nll",
    "simnpo",
    "token_kl",
    "token_nll",
    "undial",
    "wga",
]
