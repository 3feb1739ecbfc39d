"""AUSteer: turn up the few units that tell good from bad answers (guSVafqhrB, ICLR 2026).

    β_i = max(p₊, p₋), negative where p₋ > p₊       p± the share of pairs with ±δ_i > 0
    δ   = h(good) - h(bad) at the last token
    a_i = 1 + α β_i    for the k units of largest |β|, over all sites together; else 1

    h    output of a site        β    score, the paper's activation momentum
    α    `alpha`                 k    `units`

A unit is moved by α β_i times its own activation: so the strength adapts to the input, and the map
is linear all the same, and folds into the weights that make the units.

Differences. Confirmed [code] are the score, that ties go to the earlier layer and unit, that the
strength is α β_i h_i with one α, that the outputs of the MLPs' last matrices are what is steered
("ffn"), and both defaults. Ours is that any sites will do. The released code adds a fixed string in
place of the good answer where it is a refusal; here both answers are whole rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.core.checks import COUNT, FINITE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.steering.pooled import identity, pooled_in_pieces, rows_that_count
from jedit.steering.steering import Affine, Steering


class AusteerInfo(NamedTuple):
    """What the pairs said of every unit.

    Attributes:
        scores: by site β, (layers, units).
        num_pairs: how many pairs there were.
    """

    scores: dict[str, Array]
    num_pairs: int

    __repr__ = short_repr


def solve(
    delta: Float[Array, "layers n units"],
) -> Float[Array, "layers units"]:
    """Return the scores β of the differences δ of n pairs."""
    up, down = (jnp.mean((x > 0).astype(delta.dtype), axis=1) for x in (delta, -delta))
    return jnp.where(up < down, -1, 1) * jnp.maximum(up, down)


@on_auto_axes
def austeer(
    apply: Callable,
    params: PyTree,
    good: Batch,
    bad: Batch,
    *,
    sites: Sequence[str],
    units: int = 10,
    alpha: float = 5.0,
) -> tuple[Steering, AusteerInfo]:
    """Turn up or down the units by whose sign good answers differ from bad ones most often.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays.
        good: rows with the answers that are wanted; the last position that counts is read.
        bad: the same rows, in the same order, with the answers that are not.
        sites: names of sites, as `find_sites` prints them, in the order of depth.
        units: k, how many units are moved; 10, the code's (2 to 100 in the published runs).
        alpha: α, of the largest score; 5.0, the code's (4 to 100 in the published runs).

    Returns:
        The steering, and what the pairs said. Costs a pass over either set.

    Raises:
        ValueError: a number out of its range, sets of different lengths, a name that is no site, or
            a site whose positions are not the outputs'.
    """
    check_numbers(COUNT, units=units)
    check_numbers(FINITE, alpha=alpha)
    counts = [len(jax.tree.leaves(rows.inputs)[0]) for rows in (good, bad)]
    if counts[0] != counts[1]:
        raise ValueError(f"{counts[0]} good answers and {counts[1]} bad ones are no pairs")
    good, bad = rows_that_count(good, bad)
    start = identity(apply, params, good.inputs, sites)
    up, down = (pooled_in_pieces(apply, params, rows, start, "last") for rows in (good, bad))
    scores = {name: solve(up[name] - down[name]) for name in sites}
    every = jnp.concatenate([scores[name].reshape(-1) for name in sites])
    # Sorting is stable, so that of equal scores the earlier one is taken.
    chosen = jnp.argsort(-jnp.abs(every), stable=True)[: min(units, len(every))]
    gains = jnp.ones_like(every).at[chosen].add(alpha * every[chosen])
    maps, first = {}, 0
    for name in sites:
        size = scores[name].size
        maps[name] = Affine(gain=gains[first : first + size].reshape(scores[name].shape))
        first += size
    return Steering(maps), AusteerInfo(scores, len(jax.tree.leaves(good.inputs)[0]))
