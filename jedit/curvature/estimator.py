"""Estimators: three pure functions each, as an optax transform is two, and the loop over batches."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PyTree

from jedit.curvature.blocks import Curvature
from jedit.typing import Batch


class Estimator(NamedTuple):
    """How to estimate a curvature.

    Attributes:
        init: `init(params, batch) -> state`, all zero; the batch gives shapes alone.
        update: `update(state, params, batch, key) -> state`. Jit, vmap, scan and shard it; give it
            one key for all batches, labels depend on the key and on the running example number.
        finalize: `finalize(state) -> Curvature`; on the host, outside of jit.
    """

    init: Callable[[PyTree, Batch], Any]
    update: Callable[[Any, PyTree, Batch, Array], Any]
    finalize: Callable[[Any], Curvature]


@jax.jit(donate_argnums=1)
def _step(update, state, params, batch, key):
    return update(state, params, batch, key)


def estimate(
    estimator: Estimator,
    params: PyTree,
    batches: Iterable[Batch],
    *,
    key: Array,
    progress: bool = False,
) -> Curvature:
    """Estimate a curvature at `params` over batches.

    States are sums: estimates of disjoint data merge by adding their states before `finalize`. The
    loop compiles once for batches of one shape and moves nothing to the host between them.

    Args:
        estimator: `kfac(...)`, `ekfac(...)` or `diagonal(...)`.
        params: where to linearise.
        batches: any iterable of `Batch`.
        key: a `jax.random.key`; labels are sampled from it by example number, so that the result
            does not depend on how examples are cut into batches.
        progress: show a progress bar (needs tqdm).

    Returns:
        The curvature.

    Raises:
        ValueError: no batch, or what the estimator finds wrong with the first.
        FloatingPointError: a factor is not finite.
    """
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc="curvature", unit="batch")
    update = estimator.update
    if not isinstance(update, jax.tree_util.Partial):
        update = jax.tree_util.Partial(update)
    state = None
    for batch in batches:
        if state is None:
            state = estimator.init(params, batch)
        state = _step(update, state, params, batch, key)
    if state is None:
        raise ValueError("estimate got no batch: a curvature needs at least one")
    return estimator.finalize(state)
