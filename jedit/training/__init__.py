"""The training loop, what a method that trains gives to it, and one way to run any method."""

from jedit.training.loop import fit, unlearn
from jedit.training.method import TrainingMethod
from jedit.training.run_method import TrainingInfo, run_method
from jedit.training.watch import LoopState, Watch

__all__ = [
    "LoopState",
    "TrainingInfo",
    "TrainingMethod",
    "Watch",
    "fit",
    "run_method",
    "unlearn",
]
