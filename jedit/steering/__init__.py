"""Steering: sites' outputs moved by affine maps, on the way or folded into the weights."""

from jedit.steering.austeer import AusteerInfo, austeer
from jedit.steering.fold import fold, why_not_folded
from jedit.steering.lineas import (
    LineasInfo,
    Sparsity,
    lineas,
    proximal_map,
    proximal_step,
    transport_cost,
)
from jedit.steering.mean_difference import mean_difference
from jedit.steering.pooled import identity, pooled_outputs
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
    "AusteerInfo",
    "Gate",
    "LineasInfo",
    "Sparsity",
    "Steering",
    "austeer",
    "fold",
    "identity",
    "lineas",
    "mean_difference",
    "pooled_outputs",
    "proximal_map",
    "proximal_step",
    "run_steered",
    "steered",
    "transport_cost",
    "whole_outputs",
    "why_not_folded",
]
