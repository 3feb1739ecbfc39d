"""Steering: sites' outputs moved by affine maps, experts switched, and refusals by their tokens."""

from jedit.steering.fold import fold, why_not_folded
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
    "Decision",
    "Expert",
    "ExpertLayer",
    "ExpertSite",
    "Gate",
    "RefusalTokens",
    "Steering",
    "add_refusal_tokens",
    "begin_answers",
    "expert_layers",
    "expert_scores",
    "expert_use",
    "fold",
    "mark_answers",
    "refusal_probabilities",
    "refuse_by_bias",
    "refuse_by_category",
    "refuse_by_sum",
    "run_steered",
    "steered",
    "switch_experts",
    "top_experts",
    "whole_outputs",
    "why_not_folded",
]
