"""Steering: what a model does is moved without training it, on the way or at its first word."""

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

__all__ = [
    "Decision",
    "RefusalTokens",
    "add_refusal_tokens",
    "begin_answers",
    "mark_answers",
    "refusal_probabilities",
    "refuse_by_bias",
    "refuse_by_category",
    "refuse_by_sum",
]
