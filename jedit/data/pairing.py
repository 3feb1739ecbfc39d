"""Which retain rows go beside each forget row: uniform, in turn, or by the forget row's entity.

    uniform       row i of an epoch gets a retain row drawn uniformly (the leading framework's 1:1)
    in turn       row i of epoch e gets retain row (e n + i) mod m: each is seen equally often
    by entity     the j-th of entity E's J rows gets, from each of K neighbour sets N_k(E), row
                  (e J + j + o_E) mod |N_k(E)|, o_E the number of rows of the entities before it:
                  an entity meets all of its neighbours, and entities that share a set begin at
                  different rows of it

The third is MELU's modular entity-wise sampling [derived from its description: the exact order is
ours].  The forget rows themselves come in the loop's order, a permutation of all of them; what is
by entity is what stands beside each.  Each function gives the indices of one epoch; with its other
arguments bound it is a training method's `pairing`:

    beside = functools.partial(pair_by_entity, entities, neighbors)
    method = TrainingMethod(objective, optimizer, pairing=beside)

`neighbor_sets` makes the neighbour sets of what the rows' entities have in common.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from jedit.core.checks import COUNT, COUNT_OR_ZERO, check_numbers


def neighbor_sets(
    forget: Sequence[Mapping[str, str]], retain: Sequence[Mapping[str, str]]
) -> tuple[dict[str, list[int]], ...]:
    """Return neighbour sets: for each attribute the retain rows that share it, and a general set.

    Args:
        forget: by row the attributes of whom it is about, "entity" among them: its name.
        retain: the same of the retain rows.

    Returns:
        A mapping for each attribute but "entity", from an entity to the numbers of the retain rows
        that share its value; and a last one to all retain rows. An entity that shares a value with
        nobody has all retain rows there.

    Raises:
        ValueError: a row has no entity, or not the attributes of the first one.
    """
    names = list(forget[0]) if forget else []
    for row in (*forget, *retain):
        if "entity" not in row or not set(names) <= set(row):
            raise ValueError(f"expected the attributes {names}, entity among them; got {row}")
    everything = list(range(len(retain)))
    found = []
    for name in (*(n for n in names if n != "entity"), None):
        near = {}
        for row in forget:
            alike = everything
            if name is not None:
                alike = [i for i in everything if retain[i][name] == row[name]]
            near[row["entity"]] = alike or everything
        found.append(near)
    return tuple(found)


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
        epoch: number of the epoch, from 0; an entity's rows go on in line where the last ended.

    Raises:
        ValueError: an entity has no neighbour in one of the sets.
    """
    check_numbers(COUNT_OR_ZERO, epoch=epoch)
    counts = dict.fromkeys(entities, 0)
    for entity in entities:
        counts[entity] += 1
    before = dict(zip(counts, np.cumsum([0, *counts.values()])[:-1].tolist(), strict=True))
    seen = dict.fromkeys(counts, 0)
    found = np.zeros((len(entities), len(neighbors)), int)
    for i, entity in enumerate(entities):
        place = epoch * counts[entity] + seen[entity] + before[entity]
        for k, near in enumerate(neighbors):
            rows = near.get(entity, ())
            if not len(rows):
                raise ValueError(f"neighbour set {k} has no row for {entity!r}.")
            found[i, k] = rows[place % len(rows)]
        seen[entity] += 1
    return found
