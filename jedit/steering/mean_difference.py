"""The steering vector: shift a site's outputs by the difference of two sets' means.

    h <- h + s (μ₊ - μ₋)

    μ₊, μ₋    means over the target's and the source's rows of the outputs, pooled over positions

This is the baseline of the literature on steering (contrastive activation addition), and a
`Steering` whose gain is 1.
"""

from collections.abc import Callable, Sequence

from jaxtyping import PyTree

from jedit.core.batch import Batch
from jedit.core.devices import on_auto_axes
from jedit.steering.pooled import Pool, identity, means, pooled_in_pieces, rows_that_count
from jedit.steering.steering import Affine, Steering


@on_auto_axes
def mean_difference(
    apply: Callable,
    params: PyTree,
    source: Batch,
    target: Batch,
    *,
    sites: Sequence[str],
    pool: Pool = "mean",
) -> Steering:
    """Return the shift from the source's mean outputs to the target's; costs a pass over each.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays.
        source: rows as they are.
        target: rows as they are to become; as many as there are.
        sites: names of sites, as `find_sites` prints them.
        pool: "mean" of a row's positions (the default, ours), or the "last", as for contrastive
            pairs that differ at their ends.

    Raises:
        ValueError: a name is no site, a site's positions are not the outputs', or no row counts.
    """
    start = identity(apply, params, source.inputs, sites)
    before, after = (
        means(pooled_in_pieces(apply, params, rows, start, pool))
        for (rows,) in map(rows_that_count, (source, target))
    )
    return Steering({name: Affine(shift=after[name] - before[name]) for name in sites})
