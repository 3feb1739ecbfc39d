"""Optax transforms that know the geometry of what is to be retained."""

from jedit.transforms.add_constraint_gradient import (
    AddConstraintGradientState,
    add_constraint_gradient,
)
from jedit.transforms.add_l1_gradient import AddL1GradientState, add_l1_gradient
from jedit.transforms.clip_by_curvature_norm import (
    ClipByCurvatureNormState,
    clip_by_curvature_norm,
)
from jedit.transforms.finetune_modules import FinetuneModulesState, finetune_modules
from jedit.transforms.ignore_top_fraction import ignore_top_fraction
from jedit.transforms.mask_to_salient import MaskToSalientState, mask_to_salient
from jedit.transforms.natural_steps import falling, natural_steps
from jedit.transforms.orthogonalize_to_retain import (
    OrthogonalizeToRetainState,
    orthogonalize_to_retain,
)
from jedit.transforms.project_out_stored import project_out_stored
from jedit.transforms.project_realised_update import (
    ProjectRealisedUpdateState,
    project_realised_update,
)
from jedit.transforms.project_to_null_space import (
    ProjectToNullSpaceState,
    project_to_null_space,
)
from jedit.transforms.retain_neutral_surrogate import (
    RetainNeutralSurrogateState,
    retain_neutral_surrogate,
)
from jedit.transforms.scale_by_curvature import (
    ScaleByCurvatureState,
    refresh_curvature,
    scale_by_curvature,
)
from jedit.transforms.shrink_top_directions import (
    ShrinkTopDirectionsState,
    shrink_top_directions,
)
from jedit.transforms.train_adapters import Adapter, TrainAdaptersState, train_adapters
from jedit.transforms.unlearn_first import UnlearnFirstState, unlearn_first
from jedit.transforms.with_update_args import WithUpdateArgsState, with_update_args

__all__ = [
    "Adapter",
    "AddConstraintGradientState",
    "AddL1GradientState",
    "ClipByCurvatureNormState",
    "FinetuneModulesState",
    "MaskToSalientState",
    "OrthogonalizeToRetainState",
    "ProjectRealisedUpdateState",
    "ProjectToNullSpaceState",
    "RetainNeutralSurrogateState",
    "ScaleByCurvatureState",
    "ShrinkTopDirectionsState",
    "TrainAdaptersState",
    "UnlearnFirstState",
    "WithUpdateArgsState",
    "add_constraint_gradient",
    "add_l1_gradient",
    "clip_by_curvature_norm",
    "falling",
    "finetune_modules",
    "ignore_top_fraction",
    "mask_to_salient",
    "natural_steps",
    "orthogonalize_to_retain",
    "project_out_stored",
    "project_realised_update",
    "project_to_null_space",
    "refresh_curvature",
    "retain_neutral_surrogate",
    "scale_by_curvature",
    "shrink_top_directions",
    "train_adapters",
    "unlearn_first",
    "with_update_args",
]
