"""Extraction strength (after Carlini et al., arXiv 2012.07805): how short a hint is enough.

    ES_n = 1 - min{ k : greedy decoding of (x_n, y_n,<k) is y_n,>=k } / |y_n|

1: the question alone brings the whole answer; 0: not even its last token comes.  Higher: memorised.
On a forget set a good value is the retrained model's.

Nothing is decoded.  As long as greedy decoding is right its prefix is the true one, so it is right
to the end exactly if every teacher-forced prediction from k on is; then |y_n| - k is the length of
the run of right predictions at the end, and ES_n that length over |y_n|.

Differences.  open-unlearning looks for k in a loop over 0 ... |y| - 1 and takes the loop's last k
also when none was found: an answer of which nothing comes scores 1/|y|, as if its last token did,
which for answers of one or two tokens is 1 and 1/2.  Ours scores 0.  It scores 0 a row without any
labelled token, and lets it into the mean; ours leaves it out.  And it leaves each answer's last
labelled token out: see `exact_memorization`.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import by_example
from jedit.metrics._greedy import greedy_hits
from jedit.metrics.streaming import RowSums, each_batch, rows_of_sums


@on_auto_axes
def extraction_strength(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch
) -> Float[np.ndarray, " n"]:
    """Return each example's extraction strength, in the order given.

    An example none of whose outputs counts, such as one that fills up the last batch, is left out.
    Outputs that do not count may stand anywhere, between those that do as well.

    Raises:
        ValueError: if a batch is packed.
    """
    runs, counts = rows_of_sums(
        [_row_runs(apply, params, batch) for batch in each_batch(apply, params, batches)]
    )
    return runs / counts


@partial(jax.jit, static_argnums=0)
def _row_runs(apply: Apply, params: PyTree, batch: Batch) -> RowSums:
    hits, counted = greedy_hits(params, batch, apply=apply)
    hits, counted = (by_example(batch, x) for x in (hits, counted))
    misses_from_here = jnp.cumsum((counted & ~hits)[:, ::-1], axis=1)[:, ::-1]
    return RowSums(jnp.sum(hits & (misses_from_here == 0), axis=1), jnp.sum(counted, axis=1))
