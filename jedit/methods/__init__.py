"""Editing methods: one file, one paper.

Those that edit return an `Edit` and what they found on the way; those that train return a
`TrainingMethod`, which `jedit.unlearn` takes.
"""

from jedit.methods._associations import AssociationInfo, Associations, KeyState
from jedit.methods._targets import TargetInfo, target_values
from jedit.methods._training import TrainingMethod
from jedit.methods.alphaedit import alphaedit
from jedit.methods.batch_unlearn import BatchInfo, balanced, batch_unlearn, interactions
from jedit.methods.causal_trace import CausalTrace, causal_trace
from jedit.methods.curvature_engram import curvature_engram
from jedit.methods.engram import EngramInfo, engram
from jedit.methods.gu import gu
from jedit.methods.kfade import KfadeInfo, kfade
from jedit.methods.kuda import kuda
from jedit.methods.l1_sparse import l1_sparse
from jedit.methods.memit import memit
from jedit.methods.rome import rome
from jedit.methods.rosu import rosu, uam
from jedit.methods.salun import salun
from jedit.methods.sam import sam

__all__ = [
    "AssociationInfo",
    "Associations",
    "BatchInfo",
    "CausalTrace",
    "EngramInfo",
    "KeyState",
    "KfadeInfo",
    "TargetInfo",
    "TrainingMethod",
    "alphaedit",
    "balanced",
    "batch_unlearn",
    "causal_trace",
    "curvature_engram",
    "engram",
    "gu",
    "interactions",
    "kfade",
    "kuda",
    "l1_sparse",
    "memit",
    "rome",
    "rosu",
    "salun",
    "sam",
    "target_values",
    "uam",
]
