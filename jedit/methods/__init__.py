"""Editing methods: one file, one paper.

Those that edit return an `Edit` and what they found on the way; those that train return a
`TrainingMethod`, which `jedit.unlearn` takes.
"""

from jedit.methods._training import TrainingMethod
from jedit.methods.engram import EngramInfo, engram
from jedit.methods.gu import gu
from jedit.methods.kfade import KfadeInfo, kfade
from jedit.methods.l1_sparse import l1_sparse
from jedit.methods.rosu import rosu, uam
from jedit.methods.salun import salun

__all__ = [
    "EngramInfo",
    "KfadeInfo",
    "TrainingMethod",
    "engram",
    "gu",
    "kfade",
    "l1_sparse",
    "rosu",
    "salun",
    "uam",
]
