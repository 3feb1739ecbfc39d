"""jedit erases and rewrites what a trained network knows, as pure JAX functions.

apply, params, batches -> capture -> curvature -> methods and transforms -> edits -> metrics
"""

from jedit import curvature, methods, metrics, objectives, transforms
from jedit.capture import Site, Sites, capture, find_sites, weight_gradients
from jedit.curvature import (
    Curvature,
    Estimator,
    diagonal,
    ekfac,
    estimate,
    factors,
    ggn_vector_product,
    kfac,
    likelihoods,
    matvec,
    power,
    quadratic_form,
    solve,
    trace,
)
from jedit.edits import Edit, apply_edit, cast_report, edit_between, edit_norms, revert_edit
from jedit.typing import Batch
from jedit.unlearn import fit, unlearn

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Curvature",
    "Edit",
    "Estimator",
    "Site",
    "Sites",
    "apply_edit",
    "capture",
    "cast_report",
    "curvature",
    "diagonal",
    "edit_between",
    "edit_norms",
    "ekfac",
    "estimate",
    "factors",
    "find_sites",
    "fit",
    "ggn_vector_product",
    "kfac",
    "likelihoods",
    "matvec",
    "methods",
    "metrics",
    "objectives",
    "power",
    "quadratic_form",
    "revert_edit",
    "solve",
    "trace",
    "transforms",
    "unlearn",
    "weight_gradients",
]
