"""How deep the forget answers are erased: is a layer still able to say them, whatever is said?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from jedit import metrics
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tofu.membership import Answers, spread
from jedit.report import Evaluation


class Three(NamedTuple):
    """Parameters of the model that knows the rows, the one judged, and the one that never did."""

    original: PyTree
    edited: PyTree
    retrained: PyTree


def depth_of(
    model: LanguageModel, three: Three, known: Answers, stream: tuple[tuple[str, ...], ...]
) -> Evaluation:
    """Log the depth score of the edited model, row by row.

    It is taken of as many rows as the gradients, spread over the set: it costs 2 L + 4 forward
    passes of each, L the number of layers.

    Args:
        model: the language model's functions.
        three: the parameters that are compared.
        known: the forget rows.
        stream: by depth, the sites that write into the residual stream.

    Returns:
        The score, NaN at a row without one; None for the whole where no row has one, since the
        retrained model's layers lack nothing that the original's hold.
    """
    rows, index = spread(known)
    found = metrics.depth_score(model.apply, *three, rows, layers=stream)
    whole = None if np.isnan(found.mean) else found.mean
    return Evaluation(whole, {"score": found.scores}, index.tolist())
