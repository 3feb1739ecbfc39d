"""Find where parameters act linearly, and capture what enters and what flows back there."""

from jedit.tracing.discover import find_sites
from jedit.tracing.entering import Entering, Leaving
from jedit.tracing.intervene import Intervention, intervene
from jedit.tracing.pullback import Capture, capture, run_capture, weight_gradients
from jedit.tracing.sites import Site, Sites, Weight

__all__ = [
    "Capture",
    "Entering",
    "Intervention",
    "Leaving",
    "Site",
    "Sites",
    "Weight",
    "capture",
    "find_sites",
    "intervene",
    "run_capture",
    "weight_gradients",
]
