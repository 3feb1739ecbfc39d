"""Editing methods: one file, one paper.

Those that edit return an `Edit` and what they found on the way; those that train return a
`TrainingMethod`, which `jedit.unlearn` takes. `jedit.run_method` runs either and returns an edit.
"""

from jedit.methods.associations._write import AssociationInfo, Associations, KeyState, Layers
from jedit.methods.associations.alphaedit import alphaedit
from jedit.methods.associations.causal_trace import (
    CausalTrace,
    Corruption,
    Restoration,
    causal_trace,
)
from jedit.methods.associations.memit import memit
from jedit.methods.associations.rome import rome
from jedit.methods.associations.targets import Search, TargetInfo, target_values
from jedit.methods.catalogue import CATALOGUE
from jedit.methods.curvature.kfade import Ascent, KfadeInfo, kfade
from jedit.methods.curvature.natural import natural
from jedit.methods.engrams._take_out import EngramInfo
from jedit.methods.engrams.curvature_engram import curvature_engram
from jedit.methods.engrams.engram import engram
from jedit.methods.latents._autoencoder import (
    AutoencoderInfo,
    SparseAutoencoder,
    fit_autoencoder,
)
from jedit.methods.latents.sae_guided import fit_latents, sae_guided
from jedit.methods.row import ByBudget, ByScale, BySteps, Material, Need, Pace, Reach, Row
from jedit.methods.trained.attention_shifting import (
    attention_shifting,
    important_tokens,
    token_importance,
)
from jedit.methods.trained.gu import gu
from jedit.methods.trained.kuda import kuda
from jedit.methods.trained.l1_sparse import l1_sparse
from jedit.methods.trained.pdu import pdu
from jedit.methods.trained.repselect import repselect
from jedit.methods.trained.rosu import rosu, uam
from jedit.methods.trained.salun import salun
from jedit.methods.trained.sam import sam

__all__ = [
    "CATALOGUE",
    "ByBudget",
    "ByScale",
    "BySteps",
    "Material",
    "Need",
    "Pace",
    "Reach",
    "Row",
    "Ascent",
    "AssociationInfo",
    "Associations",
    "AutoencoderInfo",
    "CausalTrace",
    "Corruption",
    "EngramInfo",
    "KeyState",
    "KfadeInfo",
    "Layers",
    "Restoration",
    "Search",
    "SparseAutoencoder",
    "TargetInfo",
    "alphaedit",
    "attention_shifting",
    "causal_trace",
    "curvature_engram",
    "engram",
    "fit_autoencoder",
    "fit_latents",
    "gu",
    "important_tokens",
    "kfade",
    "kuda",
    "l1_sparse",
    "memit",
    "natural",
    "pdu",
    "repselect",
    "rome",
    "rosu",
    "salun",
    "sae_guided",
    "sam",
    "target_values",
    "token_importance",
    "uam",
]
