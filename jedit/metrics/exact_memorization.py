"""Exact memorization (Tirumala et al., arXiv 2205.10770): how much of an answer comes by itself.

    EM_n = |{s : argmax p(. | x_n, y_n,<s) = y_ns}| / |y_n|

the share of an answer's tokens that are the likeliest after the true prefix.  Higher: memorised.
On a forget set a good value is the retrained model's, which is not 0: grammar alone gives part of a
sentence.  `accuracy` is the same over all tokens at once, where long answers weigh more.

Differences.  open-unlearning leaves each answer's last labelled token out, whatever it is ("to
ignore eos prediction"); here what counts is what `mask` says, so leave the end-of-answer token out
of the mask to get its numbers, or take them from `open_unlearning.token_scores`.
"""

from collections.abc import Iterable
from functools import partial

import jax
import numpy as np
from jaxtyping import Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.metrics._greedy import greedy_hits
from jedit.metrics.streaming import RowSums, each_batch, rows_of_sums, sums_by_row


@on_auto_axes
def exact_memorization(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch
) -> Float[np.ndarray, " n"]:
    """Return each example's share of right tokens, in the order given.

    An example none of whose outputs counts, such as one that fills up the last batch, is left out.
    """
    hits, counts = rows_of_sums(
        [_row_hits(apply, params, batch) for batch in each_batch(apply, params, batches)]
    )
    return hits / counts


@partial(jax.jit, static_argnums=0)
def _row_hits(apply: Apply, params: PyTree, batch: Batch) -> RowSums:
    hits, counted = greedy_hits(params, batch, apply=apply)
    return sums_by_row(batch, hits, counted)
