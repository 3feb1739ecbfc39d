"""Interactions of users with items: a file of them, or seeded ones, as sequences by time.

A file is CSV with a header, one interaction a line, of at least the columns `user`, `item` and
`time` in any order; MovieLens's `userId`, `movieId` and `timestamp` are these too. A user's first
interaction with an item counts, later ones are left out, as next-item benchmarks have it.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jedit.core.checks import COUNT, Range, check_numbers
from jedit.data.jsonl import DataError

COLUMNS = {
    "user": ("user", "userid", "user_id"),
    "item": ("item", "itemid", "item_id", "movieid", "movie_id"),
    "time": ("time", "timestamp"),
}
LEAST = 3  # interactions of a user: one to go on from, one to learn, one to ask for
FACTORS = 4  # of users' tastes and of items
# Weights of what makes an item the next one: how popular it is, the user's taste, the item before.
POPULARITY, TASTE, BEFORE = 1.0, 3.0, 2.0


class Interactions(NamedTuple):
    """What users chose, in order of time.

    Attributes:
        users: the users' names.
        items: the items' names.
        sequences: of each user, numbers of items, each once.
    """

    users: tuple[str, ...]
    items: tuple[str, ...]
    sequences: tuple[np.ndarray, ...]


def read_interactions(path: str | Path) -> Interactions:
    """Read a file of interactions; users with fewer than three different items are left out.

    Interactions of one time stay in the order of the file.

    Args:
        path: a CSV file.

    Returns:
        The sequences; users and items by their first line.

    Raises:
        DataError: no such file, not such a file, a line that cannot be read, or no user with three
            items.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    taken: dict[str, list[tuple[int | float, str]]] = {}
    try:
        places = _columns(next(lines, []), path)
        for fields in lines:
            if not fields:
                continue
            where = f"{path}:{lines.line_num}"
            if len(fields) <= max(places.values()):
                raise DataError(
                    f"{where}: the line has {len(fields)} fields, fewer than the header names."
                )
            user, item, time = (fields[places[name]].strip() for name in COLUMNS)
            if not user or not item:
                raise DataError(f"{where}: the {'item' if user else 'user'} is empty.")
            taken.setdefault(user, []).append((_number(time, where), item))
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: not CSV: {error}.") from None
    chosen: dict[str, list[str]] = {}
    for user, pairs in taken.items():
        ordered = sorted(pairs, key=lambda pair: pair[0])
        found = list(dict.fromkeys(item for _, item in ordered))
        if len(found) >= LEAST:
            chosen[user] = found
    if not chosen:
        raise DataError(f"{path}: no user has {LEAST} different items.")
    numbers: dict[str, int] = {}
    sequences = [
        np.array([numbers.setdefault(item, len(numbers)) for item in found])
        for found in chosen.values()
    ]
    return Interactions(tuple(chosen), tuple(numbers), tuple(sequences))


def generate_interactions(
    seed: int, *, num_users: int = 600, num_items: int = 150, length: int = 20
) -> Interactions:
    """Draw interactions out of tastes: users and items are points, and some items are popular.

    A user's next item is drawn without replacement, with a log odds of its popularity, of how near
    it is to the user's taste, and of how near to the item before. Equal arguments give equal
    interactions; no global state is read or changed.

    Args:
        seed: seed of all of it.
        num_users: number of users; 600 is arbitrary.
        num_items: number of items; 150 is arbitrary.
        length: number of items of a user; 20 is arbitrary.

    Returns:
        The sequences.

    Raises:
        ValueError: a number below one, fewer than three items a user, or more than there are.
    """
    check_numbers(COUNT, num_users=num_users, num_items=num_items, length=length)
    check_numbers(Range(LEAST, num_items, is_whole=True), length=length)
    rng = np.random.default_rng(seed)
    users, items = (rng.normal(size=(n, FACTORS)) for n in (num_users, num_items))
    users, items = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (users, items))
    # A Zipf law over a random order of the items.
    popularity = -np.log1p(rng.permutation(num_items))
    sequences = []
    for user in users:
        odds = POPULARITY * popularity + TASTE * math.sqrt(FACTORS) * (items @ user)
        found: list[int] = []
        for noise in rng.gumbel(size=(length, num_items)):
            now = odds + noise
            if found:
                now = now + BEFORE * math.sqrt(FACTORS) * (items @ items[found[-1]])
            now[found] = -np.inf
            found.append(int(np.argmax(now)))
        sequences.append(np.array(found))
    of_users, of_items = (
        tuple(f"{kind} {i}" for i in range(n))
        for kind, n in (("user", num_users), ("item", num_items))
    )
    return Interactions(of_users, of_items, tuple(sequences))


def _columns(header: Sequence[str], path: Path) -> dict[str, int]:
    given = [name.strip().lower() for name in header]
    places = {}
    for name, known in COLUMNS.items():
        found = [i for i, one in enumerate(given) if one in known]
        if len(found) != 1:
            shown = repr(", ".join(given)[:80]) if any(given) else "nothing"
            raise DataError(
                f"{path}: the first line must name the columns user, item and time once each, got "
                f"{shown}."
            )
        places[name] = found[0]
    return places


def _number(text: str, where: str) -> int | float:
    try:
        return int(text)  # exact: as floats, stamps in nanoseconds would merge
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: the time must be a number, got {text[:40]!r}.")
    return number
