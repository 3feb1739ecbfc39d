"""jedit erases and rewrites what a trained network knows, as pure JAX functions.

apply, params, batches -> capture -> curvature -> methods and transforms -> edits -> metrics
"""

from jedit import attacks, curvature, geometry, methods, metrics, objectives, transforms
from jedit.capture import Site, Sites, capture, find_sites, weight_gradients
from jedit.checkpoint import (
    Checkpoint,
    Ledger,
    load_curvature,
    load_edit,
    save_curvature,
    save_edit,
)
from jedit.continual import RequestInfo, continual
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
from jedit.edits import (
    Edit,
    LowRank,
    apply_edit,
    cast_report,
    compress,
    edit_between,
    edit_norms,
    revert_edit,
    sum_edits,
)
from jedit.geometry import (
    Projector,
    null_space,
    project,
    retain_neutral_perturbation,
    retain_orthogonal,
    retain_subspace,
    scale_to_kl_budget,
)
from jedit.methods import batch_unlearn
from jedit.typing import Batch
from jedit.unlearn import LoopState, fit, unlearn

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Checkpoint",
    "Curvature",
    "Edit",
    "Estimator",
    "Ledger",
    "LoopState",
    "LowRank",
    "Projector",
    "RequestInfo",
    "Site",
    "Sites",
    "apply_edit",
    "attacks",
    "batch_unlearn",
    "capture",
    "cast_report",
    "compress",
    "continual",
    "curvature",
    "diagonal",
    "edit_between",
    "edit_norms",
    "ekfac",
    "estimate",
    "factors",
    "find_sites",
    "fit",
    "geometry",
    "ggn_vector_product",
    "kfac",
    "likelihoods",
    "load_curvature",
    "load_edit",
    "matvec",
    "methods",
    "metrics",
    "null_space",
    "objectives",
    "power",
    "project",
    "quadratic_form",
    "retain_neutral_perturbation",
    "retain_orthogonal",
    "retain_subspace",
    "revert_edit",
    "save_curvature",
    "save_edit",
    "scale_to_kl_budget",
    "solve",
    "sum_edits",
    "trace",
    "transforms",
    "unlearn",
    "weight_gradients",
]
