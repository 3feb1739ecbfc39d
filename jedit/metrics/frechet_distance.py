"""The Fréchet distance of two sets of features, each taken for normally distributed.

    d² = ‖μ - ν‖² + tr(S) + tr(T) - 2 tr (S^½ T S^½)^½

Of Inception features it is the FID (arXiv 1706.08500); here the features are the caller's.
"""

import numpy as np
from jaxtyping import Float


def frechet_distance(features: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m d"]) -> float:
    """Return d², in the features' units squared; it is computed in float64, on the host.

    Raises:
        ValueError: fewer than two rows in a set, or features of different widths.
    """
    x, y = (np.asarray(f, np.float64) for f in (features, others))
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"two sets of at least two rows of features of one width are needed, got {x.shape} "
            f"and {y.shape}"
        )
    s, t = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (x, y))
    root = _root(s)
    both = np.trace(s) + np.trace(t) - 2 * np.trace(_root(root @ t @ root))
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + max(both, 0.0))


def _root(matrix: np.ndarray) -> np.ndarray:
    """Return the symmetric root of a positive semi-definite matrix."""
    values, basis = np.linalg.eigh((matrix + matrix.T) / 2)
    return (basis * np.sqrt(np.maximum(values, 0))) @ basis.T
