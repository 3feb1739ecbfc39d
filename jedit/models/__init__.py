"""Small reference models as pure functions: each maker returns `(apply, params)`."""

from jedit.models.cnn import cnn
from jedit.models.decoding import Stepper, cached_decode, greedy_decode
from jedit.models.functional import Apply, to_pure
from jedit.models.gpt import gpt, gpt_stepper
from jedit.models.mlp import mlp

__all__ = [
    "Apply",
    "Stepper",
    "cached_decode",
    "cnn",
    "gpt",
    "gpt_stepper",
    "greedy_decode",
    "mlp",
    "to_pure",
]
