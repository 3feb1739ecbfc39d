"""Small reference models as pure functions: each maker returns `(apply, params)`."""

from jedit.models.cnn import cnn
from jedit.models.decoding import greedy_decode
from jedit.models.functional import Apply, to_pure
from jedit.models.gpt import gpt
from jedit.models.mlp import mlp

__all__ = ["Apply", "cnn", "gpt", "greedy_decode", "mlp", "to_pure"]
