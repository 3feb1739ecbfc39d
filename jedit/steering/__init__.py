"""Steering: sites' outputs moved by affine maps, experts switched, and refusals by their tokens."""

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
from jedit.steering.mote import (
    Expert,
    ExpertLayer,
    ExpertSite,
    expert_layers,
    expert_scores,
    expert_use,
    switch_experts,
    top_experts,
)
from jedit.steering.pooled import identity, pooled_outputs
from jedit.steering.refusal_tokens import (
    Decision,
    RefusalTokens,
    add_refusal_tokens,
    begin_answers,
    mark_answers,
    refusal_probabilities,
    refuse_by_bias,
    refuse_by_category,
    refuse_by_sum,
)
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
    "Decision",
    "Expert",
    "ExpertLayer",
    "ExpertSite",
    "Gate",
    "LineasInfo",
    "RefusalTokens",
    "Sparsity",
    "Steering",
    "add_refusal_tokens",
    "austeer",
    "begin_answers",
    "expert_layers",
    "expert_scores",
    "expert_use",
    "fold",
    "identity",
    "lineas",
    "mark_answers",
    "mean_difference",
    "pooled_outputs",
    "proximal_map",
    "proximal_step",
    "refusal_probabilities",
    "refuse_by_bias",
    "refuse_by_category",
    "refuse_by_sum",
    "run_steered",
    "steered",
    "switch_experts",
    "top_experts",
    "transport_cost",
    "whole_outputs",
    "why_not_folded",
]
