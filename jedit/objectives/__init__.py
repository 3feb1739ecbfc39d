"""Forget and retain losses: frozen, hashable values with one call.

    value(apply, params, forget, retain=None, reference=None) -> (scalar, aux)

forget and retain are the rows of one step; reference are the params before unlearning, which a loop
gives.  Equal values compile once.  `with_retain` puts a retain term on any of them:
`with_retain(NPO(beta=0.04), RetainKL(), weight=2.0)`; gradient difference is `with_retain(GA())`.
"""

from jedit.objectives.attention_shift import RetainAttention, SuppressAttention
from jedit.objectives.ce_u import CEU
from jedit.objectives.dialogue import Dialogue, Played
from jedit.objectives.dpo import DPO
from jedit.objectives.fit import FIT, GradedRows, Importance
from jedit.objectives.ga import GA
from jedit.objectives.gere import GeRe, ReplayedStates, RetainMargin, replayed_states
from jedit.objectives.grpo import GRPO, Answers, group_advantages
from jedit.objectives.held import RetainKL, RetainNLL, with_retain
from jedit.objectives.hidden_states import random_direction
from jedit.objectives.ihl import IHL
from jedit.objectives.learn import LearnNLL
from jedit.objectives.logit_margin import LogitMargin
from jedit.objectives.minor_part import MinorPart
from jedit.objectives.npo import NPO
from jedit.objectives.objective import Objective
from jedit.objectives.random_label import RandomLabel, relabel, relabel_among
from jedit.objectives.representation_deviation import RepresentationDeviation
from jedit.objectives.rmu import RMU, RetainStates
from jedit.objectives.sae_guided import LatentMeans, SAEGuided
from jedit.objectives.simnpo import SimNPO
from jedit.objectives.token_nll import sequence_nll, token_kl, token_nll
from jedit.objectives.uer import UER
from jedit.objectives.undial import UNDIAL
from jedit.objectives.view_batch import ViewBatch, Views, stack_views
from jedit.objectives.weighted_ascent import WGA, SatImp

__all__ = [
    "Answers",
    "CEU",
    "DPO",
    "Dialogue",
    "FIT",
    "GA",
    "GRPO",
    "GeRe",
    "GradedRows",
    "IHL",
    "Importance",
    "LatentMeans",
    "LearnNLL",
    "LogitMargin",
    "MinorPart",
    "NPO",
    "Objective",
    "Played",
    "RMU",
    "RandomLabel",
    "RepresentationDeviation",
    "RetainAttention",
    "ReplayedStates",
    "RetainKL",
    "RetainMargin",
    "RetainNLL",
    "RetainStates",
    "SAEGuided",
    "SatImp",
    "SimNPO",
    "SuppressAttention",
    "UER",
    "UNDIAL",
    "ViewBatch",
    "Views",
    "WGA",
    "group_advantages",
    "random_direction",
    "relabel",
    "relabel_among",
    "replayed_states",
    "sequence_nll",
    "stack_views",
    "token_kl",
    "token_nll",
    "with_retain",
]
