"""Truth ratio (TOFU, arXiv 2401.06121): are wrong answers as likely as a right one?

    TR_n = exp( L_n(paraphrased answer) - mean_k L_n(wrong answer k) )

L the length-normalised loss, `answer_nll_per_row`: the wrong answers' geometric mean probability
per token over that of the paraphrase.  Near 0: the fact is known; about 1 or above: it is not.  On
the forget set, compare its distribution with a retrained model's (`forget_quality`), not its mean.

Differences.  The paper's text has the wrong answers' arithmetic mean, its authors' code and all
published numbers the geometric one, as here.  open-unlearning adds 1e-10 to the denominator, which
pulls the ratio to 0 where the paraphrase's loss is above 23 nats per token, as a collapsed model's.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


def truth_ratio(paraphrased_loss: ArrayLike, perturbed_loss: ArrayLike) -> Float[np.ndarray, " n"]:
    """Return each question's truth ratio: wrong answers' probability over the paraphrase's.

    Args:
        paraphrased_loss: (n,), the loss of each question's paraphrased answer.
        perturbed_loss: (n, k), those of its k wrong answers.

    Returns:
        The n ratios, in float64.

    Raises:
        ValueError: if the shapes are not (n,) and (n, k).
    """
    right = np.asarray(paraphrased_loss, np.float64)
    wrong = np.asarray(perturbed_loss, np.float64)
    if right.ndim != 1 or wrong.ndim != 2 or len(wrong) != len(right) or wrong.shape[1] == 0:
        raise ValueError(
            f"expected losses of shapes (n,) and (n, k), got {right.shape} and {wrong.shape}"
        )
    return np.exp(right - wrong.mean(axis=1))
