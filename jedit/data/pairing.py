"""Which retain rows go beside each forget row: uniform, in turn, or by the forget row's entity.

    uniform       row i of an epoch gets a retain row drawn uniformly (the leading framework's 1:1)
    in turn       row i of epoch e gets retain row (e n + i) mod m: each is seen equally often
    by entity     the j-th row of entity E gets, from each of K neighbour sets N_k(E), row
                  (e + j) mod |N_k(E)|, so that an entity's rows meet all of its neighbours

The third is MELU's modular entity-wise sampling [derived from its description: the exact order is
ours].  Each function gives the indices of one epoch; gather with them, and hand
`(forget, paired retain)` to `jedit.unlearn` as one forget set whose rows belong together.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from jedit.core.checks import COUNT, COUNT_OR_ZERO, check_numbers


def pair_uniformly(
    num_forget: int, num_retain: int, *, epoch: int, key: Key[Array, ""]
) -> Int[np.ndarray, "num_forget 1"]:
    """Return one retain row for each forget row, drawn with replacement."""
    check_numbers(COUNT, num_forget=num_forget, num_retain=num_retain)
    check_numbers(COUNT_OR_ZERO, epoch=epoch)
    drawn = jax.random.randint(jax.random.fold_in(key, epoch), (num_forget, 1), 0, num_retain)
    return np.asarray(drawn)


def pair_in_turn(
    num_forget: int, num_retain: int, *, epoch: int
) -> Int[np.ndarray, "num_forget 1"]:
    """Return one retain row for each forget row, each retain row once before any comes again."""
    check_numbers(COUNT, num_forget=num_forget, num_retain=num_retain)
    check_numbers(COUNT_OR_ZERO, epoch=epoch)
    return ((epoch * num_forget + np.arange(num_forget)) % num_retain)[:, None]


def pair_by_entity(
    entities: Sequence[str],
    neighbors: Sequence[Mapping[str, Sequence[int]]],
    *,
    epoch: int,
) -> Int[np.ndarray, "num_forget num_sets"]:
    """Return one retain row of each neighbour set for each forget row.

    Args:
        entities: names of whom each forget row is about.
        neighbors: neighbour sets (of the same profession, of the same country, unrelated, ...),
            each a mapping from an entity to the retain rows that are its neighbours.
        epoch: number of the epoch, from 0; another epoch takes other neighbours.

    Raises:
        ValueError: an entity has no neighbour in one of the sets.
    """
    check_numbers(COUNT_OR_ZERO, epoch=epoch)
    seen: dict[str, int] = {}
    found = np.zeros((len(entities), len(neighbors)), int)
    for i, entity in enumerate(entities):
        j = seen.setdefault(entity, 0)
        for k, near in enumerate(neighbors):
            rows = near.get(entity, ())
            if not len(rows):
                raise ValueError(f"neighbour set {k} has no row for {entity!r}.")
            found[i, k] = rows[(epoch + j) % len(rows)]
        seen[entity] += 1
    return found
