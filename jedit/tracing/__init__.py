"""Find where parameters act linearly, and capture what enters and what flows back there."""

from jedit.tracing.attention import (
    Attended,
    Attention,
    Attentions,
    attention_weights,
    find_attention,
)
from jedit.tracing.attention_maps import AttentionMaps
from jedit.tracing.cosines import Cosines
from jedit.tracing.discover import find_sites
from jedit.tracing.entering import Entering, Leaving
from jedit.tracing.intervene import Intervention, intervene
from jedit.tracing.pullback import Capture, capture, run_capture, weight_gradients
from jedit.tracing.rewrite import Rewritten, rewrite_outputs
from jedit.tracing.sites import Site, Sites, Weight

__all__ = [
    "Attended",
    "Attention",
    "AttentionMaps",
    "Attentions",
    "Capture",
    "Cosines",
    "Entering",
    "Intervention",
    "Leaving",
    "Rewritten",
    "Site",
    "Sites",
    "Weight",
    "attention_weights",
    "capture",
    "find_attention",
    "find_sites",
    "intervene",
    "rewrite_outputs",
    "run_capture",
    "weight_gradients",
]
