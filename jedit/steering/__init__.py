"""Steering: sites' outputs moved by affine maps, on the way or folded into the weights."""

from jedit.steering.fold import fold, why_not_folded
from jedit.steering.steering import (
    Affine,
    Gate,
    Steering,
    run_steered,
    steered,
    whole_outputs,
)

__all__ = [
    "Affine",
    "Gate",
    "Steering",
    "fold",
    "run_steered",
    "steered",
    "whole_outputs",
    "why_not_folded",
]
