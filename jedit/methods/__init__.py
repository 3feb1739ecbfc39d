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
from jedit.methods.consolidation._anchor import Anchor, anchored
from jedit.methods.consolidation.ewc import EWC
from jedit.methods.consolidation.gere import gere
from jedit.methods.consolidation.intact import InTAct, Intervals, activation_intervals
from jedit.methods.consolidation.k_fpf import k_fpf, module_sensitivity, sensitive_modules
from jedit.methods.consolidation.ogd import Stored, ogd, stored_gradients
from jedit.methods.consolidation.refresh import refresh_learning
from jedit.methods.consolidation.rft import RftInfo, RftStages, filter_rollouts, rft
from jedit.methods.curvature.curvature_pruning import PruningInfo, curvature_pruning
from jedit.methods.curvature.kfade import Ascent, KfadeInfo, kfade
from jedit.methods.curvature.natural import natural
from jedit.methods.curvature.ucan import UcanInfo, ucan
from jedit.methods.engrams._take_out import EngramInfo
from jedit.methods.engrams.curvature_engram import curvature_engram
from jedit.methods.engrams.engram import engram
from jedit.methods.latents._autoencoder import (
    AutoencoderInfo,
    SparseAutoencoder,
    fit_autoencoder,
)
from jedit.methods.latents.sae_guided import fit_latents, sae_guided
from jedit.methods.pruning.memorised_subspace import SubspaceInfo, memorised_subspace
from jedit.methods.row import ByBudget, ByDraws, ByScale, BySteps, Material, Need, Pace, Reach, Row
from jedit.methods.trained.attention_shifting import (
    attention_shifting,
    important_tokens,
    token_importance,
)
from jedit.methods.trained.cure import ModuleEffects, cure, module_effects
from jedit.methods.trained.fit import (
    distinct_requests,
    fit_unlearning,
    graded_rows,
    gradient_importance,
    influential_layers,
)
from jedit.methods.trained.gu import gu
from jedit.methods.trained.kuda import kuda
from jedit.methods.trained.l1_sparse import l1_sparse
from jedit.methods.trained.mcu import mcu
from jedit.methods.trained.ofmu import ofmu
from jedit.methods.trained.pdu import pdu
from jedit.methods.trained.reglu import Directions, reglu
from jedit.methods.trained.repselect import repselect, repselect_moments
from jedit.methods.trained.rosu import rosu, uam
from jedit.methods.trained.rule import RuleInfo, RuleStages, rule
from jedit.methods.trained.salun import salun
from jedit.methods.trained.sam import sam
from jedit.methods.trained.ssiuu import ssiuu

__all__ = [
    "CATALOGUE",
    "EWC",
    "Anchor",
    "Ascent",
    "AssociationInfo",
    "Associations",
    "AutoencoderInfo",
    "ByBudget",
    "ByDraws",
    "ByScale",
    "BySteps",
    "CausalTrace",
    "Corruption",
    "Directions",
    "EngramInfo",
    "InTAct",
    "Intervals",
    "KeyState",
    "KfadeInfo",
    "Layers",
    "Material",
    "ModuleEffects",
    "Need",
    "Pace",
    "PruningInfo",
    "Reach",
    "Restoration",
    "RftInfo",
    "RftStages",
    "Row",
    "RuleInfo",
    "RuleStages",
    "Search",
    "SparseAutoencoder",
    "Stored",
    "SubspaceInfo",
    "TargetInfo",
    "UcanInfo",
    "activation_intervals",
    "alphaedit",
    "anchored",
    "attention_shifting",
    "causal_trace",
    "cure",
    "curvature_engram",
    "curvature_pruning",
    "distinct_requests",
    "engram",
    "filter_rollouts",
    "fit_autoencoder",
    "fit_latents",
    "fit_unlearning",
    "gere",
    "graded_rows",
    "gradient_importance",
    "gu",
    "important_tokens",
    "influential_layers",
    "k_fpf",
    "kfade",
    "kuda",
    "l1_sparse",
    "mcu",
    "memit",
    "memorised_subspace",
    "module_effects",
    "module_sensitivity",
    "natural",
    "ofmu",
    "ogd",
    "pdu",
    "refresh_learning",
    "reglu",
    "repselect",
    "repselect_moments",
    "rft",
    "rome",
    "rosu",
    "rule",
    "sae_guided",
    "salun",
    "sam",
    "sensitive_modules",
    "ssiuu",
    "stored_gradients",
    "target_values",
    "token_importance",
    "uam",
    "ucan",
]
