"""Numbers that judge any params, whichever method made them."""

from jedit.metrics.accuracy import accuracy
from jedit.metrics.aggregate_scores import (
    memorization_score,
    overall_score,
    privacy_score,
    utility_score,
)
from jedit.metrics.attribution import (
    Influence,
    InfluenceShift,
    attribution,
    influence,
    influence_shift,
)
from jedit.metrics.counterfact import (
    AccuracyScores,
    AnswerLosses,
    PreferenceScores,
    accuracy_scores,
    preference_scores,
)
from jedit.metrics.depth_score import DepthScores, depth_score
from jedit.metrics.exact_memorization import exact_memorization
from jedit.metrics.extraction_strength import extraction_strength
from jedit.metrics.forget_quality import forget_quality
from jedit.metrics.frechet_distance import frechet_distance
from jedit.metrics.gradient_norm import gradient_norm_scores
from jedit.metrics.likelihood_attacks import (
    min_k_plus_plus_scores,
    min_k_scores,
    reference_scores,
    zlib_scores,
)
from jedit.metrics.membership import MembershipAttack, membership_attack, membership_scores
from jedit.metrics.memorised_samples import memorised_samples
from jedit.metrics.model_utility import (
    SetUtility,
    forget_truth_ratio,
    model_utility,
    set_utility,
)
from jedit.metrics.multiple_choice import multiple_choice_accuracy, normalized_choice_accuracy
from jedit.metrics.muse import knowmem, verbmem
from jedit.metrics.ngram_entropy import ngram_entropy
from jedit.metrics.nll import answer_nll_per_row, answer_nll_sum_per_row, nll
from jedit.metrics.output_kl import output_kl, output_kl_per_row
from jedit.metrics.privleak import membership_auc, privleak
from jedit.metrics.probability import answer_probability, normalized_probability
from jedit.metrics.recovery import ComponentRecovery, recovery_by_component
from jedit.metrics.refusal import answer_rewards, refusal_rewards, refuses
from jedit.metrics.rouge import Rouge, rouge
from jedit.metrics.stability import (
    fit_forget_degree,
    fit_retain_utility,
    forget_degree,
    minimum_accuracy,
    retained_utility,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)
from jedit.metrics.truth_ratio import truth_ratio
from jedit.metrics.unlearning_scores import UnlearningScores, average_gap, tug_of_war

__all__ = [
    "AccuracyScores",
    "AnswerLosses",
    "ComponentRecovery",
    "DepthScores",
    "Influence",
    "InfluenceShift",
    "MembershipAttack",
    "PreferenceScores",
    "Rouge",
    "SetUtility",
    "UnlearningScores",
    "accuracy",
    "accuracy_scores",
    "answer_nll_per_row",
    "answer_nll_sum_per_row",
    "answer_probability",
    "answer_rewards",
    "attribution",
    "average_gap",
    "depth_score",
    "exact_memorization",
    "extraction_strength",
    "fit_forget_degree",
    "fit_retain_utility",
    "forget_degree",
    "forget_quality",
    "forget_truth_ratio",
    "frechet_distance",
    "gradient_norm_scores",
    "influence",
    "influence_shift",
    "knowmem",
    "membership_attack",
    "membership_auc",
    "membership_scores",
    "memorised_samples",
    "memorization_score",
    "min_k_plus_plus_scores",
    "min_k_scores",
    "minimum_accuracy",
    "model_utility",
    "multiple_choice_accuracy",
    "ngram_entropy",
    "nll",
    "normalized_choice_accuracy",
    "normalized_probability",
    "output_kl",
    "output_kl_per_row",
    "overall_score",
    "preference_scores",
    "privacy_score",
    "privleak",
    "recovery_by_component",
    "reference_scores",
    "refusal_rewards",
    "refuses",
    "retained_utility",
    "rouge",
    "set_utility",
    "truth_ratio",
    "tug_of_war",
    "utility_score",
    "verbmem",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
    "zlib_scores",
]
