"""Find where parameters act linearly, and capture what enters and what flows back there."""

from jedit.capture.capture import Capture, capture, run_capture, weight_gradients
from jedit.capture.discover import find_sites
from jedit.capture.intervene import Intervention, intervene
from jedit.capture.sites import Site, Sites, Weight

__all__ = [
    "Capture",
    "Intervention",
    "Site",
    "Sites",
    "Weight",
    "capture",
    "find_sites",
    "intervene",
    "run_capture",
    "weight_gradients",
]
