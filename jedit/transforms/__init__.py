"""Optax transforms that know the geometry of what is to be retained."""

from jedit.transforms.clip_by_curvature_norm import (
    ClipByCurvatureNormState,
    clip_by_curvature_norm,
)
from jedit.transforms.scale_by_curvature import (
    ScaleByCurvatureState,
    refresh_curvature,
    scale_by_curvature,
)

__all__ = [
    "ClipByCurvatureNormState",
    "ScaleByCurvatureState",
    "clip_by_curvature_norm",
    "refresh_curvature",
    "scale_by_curvature",
]
