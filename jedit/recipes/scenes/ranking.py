"""How a recommender ranks: recall@10 and NDCG@10 of the items that were chosen next."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree

from jedit.core.batch import Batch
from jedit.data import batches
from jedit.recipes.fitting import rows_of

TOP = 10


def ranking(apply: Callable, params: PyTree, rows: Batch, *, chunk: int = 64) -> dict[str, float]:
    """Rank all items but those that the user has had, where the rows count, by scikit-learn.

    Each place where rows count has one right item, so that recall is how often it is among the
    first ten, and NDCG the mean of 1/log2(1 + rank) where it is.

    Args:
        apply: `apply(params, items) -> logits`, of which the first is that of padding.
        params: the parameters.
        rows: items, by time, with the next ones for targets; mask says which are asked for.
        chunk: rows that are computed at a time; 64 is arbitrary.

    Returns:
        "recall" and "ndcg", both of the first ten; a model whose logits are not finite ranks
        nothing, and has 0.
    """
    from sklearn.metrics import ndcg_score, top_k_accuracy_score

    scores, labels = [], []
    for part in batches(rows, min(chunk, rows_of(rows))):
        logits = np.asarray(_outputs(apply, params, part.inputs), np.float64)
        items, targets = np.asarray(part.inputs), np.asarray(part.targets)
        for row, place in zip(*np.nonzero(_counted(part)), strict=True):
            one = logits[row, place, 1:].copy()
            if not np.all(np.isfinite(one)):
                return {"recall": 0.0, "ndcg": 0.0}
            seen = items[row, : place + 1]
            one[seen[seen > 0] - 1] = one.min() - 1  # below all others
            scores.append(one)
            labels.append(targets[row, place] - 1)
    scores, labels = np.stack(scores), np.array(labels)
    every = np.arange(scores.shape[1])
    recall = top_k_accuracy_score(labels, scores, k=TOP, labels=every)
    ndcg = ndcg_score(labels[:, None] == every[None], scores, k=TOP)
    return {"recall": float(recall), "ndcg": float(ndcg)}


@functools.partial(jax.jit, static_argnums=0)
def _outputs(apply: Callable, params: PyTree, inputs: PyTree) -> jax.Array:
    return apply(params, inputs)


def _counted(rows: Batch) -> np.ndarray:
    is_counted = np.asarray(rows.mask) > 0
    return is_counted if rows.valid is None else is_counted & (np.asarray(rows.valid) > 0)
