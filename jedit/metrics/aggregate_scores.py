"""OpenUnlearning's four aggregates (Dorna et al., arXiv 2506.12618, appendix F.1): 1 is best.

    memorization   HM(1 - ES, 1 - EM, 1 - P_para, 1 - T)
    privacy        HM_a(s_a),  s_a = clip(1 - |AUC_a - AUC*_a| / AUC*_a, 0, 1)
    utility        min(1, MU / MU_0)
    overall        HM(memorization, privacy, utility)

    HM      harmonic mean, 0 if one of its numbers is
    ES, EM  extraction strength and exact memorization of the forget answers, their means
    P_para  mean probability of the forget answers in other words
    T       mean_n P_n / (P_n + P_n^wrong) = mean_n 1 / (1 + TR_n), with `truth_ratio`'s TR
    a       the attacks by loss, zlib, Min-K% and Min-K%++
    *, _0   of the retrained model, and of the original

Utility, there HM(MU/MU_0, fluency/fluency_0), is without its second part: fluency is what a
classifier of gibberish says of the generated answers, and jedit runs none.  So utility, and with it
overall, is at most as strict as theirs.

Differences.  The paper's appendix says what s_a is for and gives no equation that we could read;
ours is that of the released code of the Unlearning Depth Score (arXiv 2605.24614), which follows
it.  That code counts undefined numbers as absent; ours refuses them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from jedit.core.checks import NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, SHARE, check_numbers


def memorization_score(
    extraction_strength: float,
    exact_memorization: float,
    paraphrase_probability: float,
    truth_ratio: ArrayLike,
) -> float:
    """Return how little is memorized, from 0 to 1.

    Args:
        extraction_strength: mean of the forget answers' `extraction_strength`.
        exact_memorization: mean of the forget answers' `exact_memorization`.
        paraphrase_probability: mean of the `answer_probability` of the forget answers in other
            words.
        truth_ratio: `truth_ratio` of each forget question, (n,); infinity is allowed.

    Returns:
        The harmonic mean of four numbers, higher where less is memorized.

    Raises:
        ValueError: a number is not from 0 to 1, or there is no truth ratio, or one is negative or
            NaN.
    """
    parts = {
        "extraction_strength": extraction_strength,
        "exact_memorization": exact_memorization,
        "paraphrase_probability": paraphrase_probability,
    }
    check_numbers(SHARE, **parts)
    ratios = np.asarray(truth_ratio, np.float64)
    if ratios.ndim != 1 or ratios.size == 0 or not np.all(ratios >= 0):
        raise ValueError(
            f"truth_ratio must be numbers of shape (n,), n > 0, all at least 0; got {ratios}"
        )
    known = float(np.mean(1 / (1 + ratios)))
    return _harmonic_mean([1 - x for x in (*parts.values(), known)])


def privacy_score(aucs: Mapping[str, float], retrained_aucs: Mapping[str, float]) -> float:
    """Return how near membership attacks are to what they are on the retrained model, 0 to 1.

    Args:
        aucs: `membership_auc` of the edited model, by attack.
        retrained_aucs: the same of the retrained model, none of them 0, by the same attacks.

    Returns:
        The harmonic mean over the attacks; 1 for the retrained model.

    Raises:
        ValueError: the attacks are not the same, or none; an area is not from 0 to 1.
    """
    if not aucs or aucs.keys() != retrained_aucs.keys():
        raise ValueError(f"expected the same attacks, got {list(aucs)} and {list(retrained_aucs)}")
    check_numbers(SHARE, **aucs)
    check_numbers(POSITIVE_SHARE, **retrained_aucs)
    return _harmonic_mean(
        [max(0.0, 1 - abs(aucs[name] - auc) / auc) for name, auc in retrained_aucs.items()]
    )


def utility_score(utility: float, original_utility: float) -> float:
    """Return the share of the original model's `model_utility` that is left, 1 at most.

    OpenUnlearning's fluency is not in it: see the head of this file.

    Raises:
        ValueError: the original's is not positive, or the other one negative.
    """
    check_numbers(NOT_NEGATIVE, utility=utility)
    check_numbers(POSITIVE, original_utility=original_utility)
    return min(1.0, utility / original_utility)


def overall_score(memorization: float, privacy: float, utility: float) -> float:
    """Return the harmonic mean of the three aggregates, 0 if one of them is 0.

    Raises:
        ValueError: one is not from 0 to 1.
    """
    check_numbers(SHARE, memorization=memorization, privacy=privacy, utility=utility)
    return _harmonic_mean([memorization, privacy, utility])


def _harmonic_mean(values: Sequence[float]) -> float:
    return len(values) / sum(1 / x for x in values) if all(x > 0 for x in values) else 0.0
