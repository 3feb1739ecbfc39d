"""Forget Quality (TOFU, arXiv 2401.06121): can the model be told from a retrained one?

    FQ = p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios of the forget
         questions under the unlearned model and under one trained without them

Higher is better: near 1 the two distributions cannot be told apart, below 0.05 they can.  A p-value
also falls with the number of questions, so compare it only at the same number.

Differences: none.  The authors test the reciprocals of the truth ratios, which turns their order
round and leaves the p-value as it is.
"""

import numpy as np
from numpy.typing import ArrayLike


def forget_quality(truth_ratio: ArrayLike, retain_truth_ratio: ArrayLike) -> float:
    """Return the two-sided p-value of the test that both models' truth ratios are alike.

    Args:
        truth_ratio: (n,), of the forget questions under the model that is judged.
        retain_truth_ratio: (m,), of the forget questions under the retrained model.

    Returns:
        The p-value.

    Raises:
        ValueError: if one of them is empty, has more than one axis or holds something not finite.
    """
    from scipy import stats  # half a second of import, needed here alone

    samples = [np.asarray(x, np.float64) for x in (truth_ratio, retain_truth_ratio)]
    for name, sample in zip(("truth_ratio", "retain_truth_ratio"), samples, strict=True):
        if sample.ndim != 1 or sample.size == 0 or not np.all(np.isfinite(sample)):
            raise ValueError(
                f"{name} must be finite numbers of shape (n,), n > 0; got shape {sample.shape} "
                f"with {np.sum(~np.isfinite(sample))} not finite"
            )
    result = stats.ks_2samp(samples[0], samples[1])
    return float(result.pvalue)  # pyright: ignore[reportAttributeAccessIssue]
