"""The training loop, and what a method that trains gives to it."""

from jedit.training.loop import LoopState, fit, unlearn
from jedit.training.method import TrainingMethod

__all__ = ["LoopState", "TrainingMethod", "fit", "unlearn"]
