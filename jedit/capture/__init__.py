"""Find where parameters act linearly, and capture what enters and what flows back there."""

from jedit.capture.capture import Capture, capture, run_capture, weight_gradients
from jedit.capture.discover import find_sites
from jedit.capture.sites import Site, Sites, Weight

__all__ = [
    "Capture",
    "Site",
    "Sites",
    "Weight",
    "capture",
    "find_sites",
    "run_capture",
    "weight_gradients",
]
