"""jedit erases and rewrites what a trained network knows, as pure JAX functions.

    apply, params, batches -> tracing -> curvature -> methods and transforms -> edits -> metrics

![Forget loss against retain KL for every method, on digits](../.github/demo.png)

`find_sites` says what of a model can be edited, `kfac` and `estimate` measure what the rows to keep
need, `jedit.methods` edit, `apply_edit` applies. Notebooks, executed:

- [your own model](notebooks/00_your_own_model.html): an NNX network, an Equinox network, a folder
- [forget a class](notebooks/01_forget_a_class.html)
- [retain-orthogonal geometry](notebooks/02_retain_orthogonal_geometry.html)
- [any optax loop](notebooks/03_optax_any_loop.html)
- [engrams](notebooks/04_engrams.html)
- [TOFU in small](notebooks/05_tofu.html)
- [many requests](notebooks/06_many_requests.html)
"""

from jedit import (
    attacks,
    checkpoint,
    core,
    curvature,
    data,
    edits,
    geometry,
    methods,
    metrics,
    models,
    objectives,
    report,
    requests,
    steering,
    tracing,
    training,
    transforms,
)
from jedit.checkpoint import (
    Checkpoint,
    Ledger,
    load_curvature,
    load_edit,
    save_curvature,
    save_edit,
)
from jedit.core.batch import Batch
from jedit.curvature import (
    Curvature,
    Estimator,
    Factorize,
    diagonal,
    ekfac,
    estimate,
    estimate_in_groups,
    factors,
    ggn_vector_product,
    inverted,
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
from jedit.requests import (
    ForgetInfo,
    Forgetting,
    Natural,
    Recovery,
    RequestInfo,
    Rewind,
    Unseen,
    Watching,
    batch_unlearn,
    continual,
    forget,
)
from jedit.tracing import Site, Sites, capture, find_sites, weight_gradients
from jedit.training import LoopState, TrainingMethod, Watch, fit, run_method, unlearn

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Checkpoint",
    "Curvature",
    "Edit",
    "Estimator",
    "ForgetInfo",
    "Forgetting",
    "Ledger",
    "LoopState",
    "LowRank",
    "Natural",
    "Projector",
    "Recovery",
    "RequestInfo",
    "Rewind",
    "Site",
    "Sites",
    "TrainingMethod",
    "Unseen",
    "Watch",
    "Watching",
    "apply_edit",
    "attacks",
    "batch_unlearn",
    "capture",
    "cast_report",
    "checkpoint",
    "compress",
    "continual",
    "core",
    "curvature",
    "data",
    "diagonal",
    "edit_between",
    "edit_norms",
    "edits",
    "Factorize",
    "ekfac",
    "estimate",
    "estimate_in_groups",
    "factors",
    "find_sites",
    "fit",
    "forget",
    "geometry",
    "ggn_vector_product",
    "inverted",
    "kfac",
    "likelihoods",
    "load_curvature",
    "load_edit",
    "matvec",
    "methods",
    "metrics",
    "models",
    "null_space",
    "objectives",
    "power",
    "project",
    "quadratic_form",
    "report",
    "requests",
    "steering",
    "retain_neutral_perturbation",
    "retain_orthogonal",
    "retain_subspace",
    "revert_edit",
    "run_method",
    "save_curvature",
    "save_edit",
    "scale_to_kl_budget",
    "solve",
    "sum_edits",
    "trace",
    "tracing",
    "training",
    "transforms",
    "unlearn",
    "weight_gradients",
]
