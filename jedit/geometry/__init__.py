"""Subspaces and trust regions that keep the retain set where it is."""

from jedit.geometry.null_space import NullSpaceReport, Projector, null_space, project
from jedit.geometry.retain_subspace import (
    EUCLIDEAN,
    RetainSubspace,
    SubspaceState,
    Whitening,
    adam_whitening,
    curvature_whitening,
    joint_direction,
    project_out,
    retain_subspace,
)
from jedit.geometry.surrogate import (
    RetainOrthogonalInfo,
    retain_neutral_perturbation,
    retain_orthogonal,
)
from jedit.geometry.trust_region import (
    RetainKl,
    TrustRegionInfo,
    largest_step_within,
    scale_to_kl_budget,
)

__all__ = [
    "EUCLIDEAN",
    "NullSpaceReport",
    "Projector",
    "RetainKl",
    "RetainOrthogonalInfo",
    "RetainSubspace",
    "SubspaceState",
    "TrustRegionInfo",
    "Whitening",
    "adam_whitening",
    "curvature_whitening",
    "joint_direction",
    "largest_step_within",
    "null_space",
    "project",
    "project_out",
    "retain_neutral_perturbation",
    "retain_orthogonal",
    "retain_subspace",
    "scale_to_kl_budget",
]
