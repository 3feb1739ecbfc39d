"""Forget and retain losses, one file each.

Each is `(params, forget, retain, *, apply, ...) -> (scalar, aux)`; `functools.partial`
fixes `apply` and whatever else there is.
"""

from jedit.objectives.ga import ga
from jedit.objectives.graddiff import graddiff
from jedit.objectives.npo import npo, npo_from_nll
from jedit.objectives.retain import retain_kl, retain_nll
from jedit.objectives.token_nll import sequence_nll, token_kl, token_nll

__all__ = [
    "ga",
    "graddiff",
    "npo",
    "npo_from_nll",
    "retain_kl",
    "retain_nll",
    "sequence_nll",
    "token_kl",
    "token_nll",
]
