"""Invented classification tasks over short rows of symbols, all answered by the same two words.

A row is the task's own word and eight symbols, a to h, of which e to h are "high"; what is to be
said after it is yes or no. Both are equally frequent in every set of every task, so that a guess is
right half of the time.

    first         the first symbol is high
    last          the last symbol is high
    sum           the first two symbols, a = 0 to h = 7, add up to more than 7
    comparison    the first symbol comes after the second
    majority      more than half of the first seven are high
    parity        an odd number of the first three is high
    repeat        the first symbol is the last one
    contains      there is an a
    neighbours    a symbol stands next to its like
    by heart      a table of the third and the fourth symbol, drawn by the seed
    vote          by chance, yes the likelier the more are high: nobody can be sure
    clear vote    the same with log odds three times as large

Some look at few places, some at all of them; what a table says has no rule.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jedit.core.checks import Range, check_numbers

LENGTH, SYMBOLS = 8, 8
HIGH = SYMBOLS // 2  # the first of the high symbols
VOTE_SLOPE, CLEAR_SLOPE = 1.0, 3.0  # of the log odds by the number of high symbols; arbitrary
SETS = ("train", "choice", "test")

Symbols = Int[np.ndarray, "n symbols"]
Rule = Callable[[Symbols, np.random.Generator], Bool[np.ndarray, " n"]]


def _high(x: Symbols) -> Bool[np.ndarray, "n places"]:
    return x >= HIGH


def _vote(x: Symbols, rng: np.random.Generator, slope: float) -> Bool[np.ndarray, " n"]:
    log_odds = slope * (_high(x).sum(axis=1) - LENGTH / 2)
    return rng.random(len(x)) < 1 / (1 + np.exp(-log_odds))


RULES: dict[str, Rule] = {
    "first": lambda x, _: _high(x)[:, 0],
    "last": lambda x, _: _high(x)[:, -1],
    "sum": lambda x, _: x[:, 0] + x[:, 1] > 7,
    "comparison": lambda x, _: x[:, 0] > x[:, 1],
    "majority": lambda x, _: _high(x)[:, :7].sum(axis=1) > 3,
    "parity": lambda x, _: _high(x)[:, :3].sum(axis=1) % 2 == 1,
    "repeat": lambda x, _: x[:, 0] == x[:, -1],
    "contains": lambda x, _: (x == 0).any(axis=1),
    "neighbours": lambda x, _: (x[:, 1:] == x[:, :-1]).any(axis=1),
    "vote": functools.partial(_vote, slope=VOTE_SLOPE),
    "clear vote": functools.partial(_vote, slope=CLEAR_SLOPE),
}
BY_HEART = "by heart"
TASKS = (*RULES, BY_HEART)
# Symbols come first, then yes and no, then the tasks' words.
NO, YES = SYMBOLS, SYMBOLS + 1
VOCAB = SYMBOLS + 2 + len(TASKS)


class TaskRows(NamedTuple):
    """Rows of one task, as token ids.

    Attributes:
        tokens: the task's word and the symbols, (n, 9).
        answers: `YES` or `NO`, (n,).
    """

    tokens: Int[np.ndarray, "n seq"]
    answers: Int[np.ndarray, " n"]


def make_token_tasks(seed: int, *, rows: int, judged: int) -> dict[str, dict[str, TaskRows]]:
    """Make the rows of all tasks; equal arguments give equal rows, and no row is there twice.

    Args:
        seed: of the rows and of the table that is learnt by heart.
        rows: number of rows to train on, of each task, even.
        judged: number of rows in each of the two sets that no model is trained on, even.

    Returns:
        By task and set ("train"; "choice", by which settings are chosen; "test") the rows.

    Raises:
        ValueError: a number is odd or out of its range.
    """
    check_numbers(Range(2, 2**15, is_whole=True), rows=rows, judged=judged)
    if rows % 2 or judged % 2:
        raise ValueError(f"half of each set is yes: give even numbers, got {rows=}, {judged=}")
    rng = np.random.default_rng(seed)
    table = np.zeros(SYMBOLS**2, bool)
    table[rng.permutation(len(table))[: len(table) // 2]] = True
    rules = dict(RULES) | {BY_HEART: lambda x, _: table[SYMBOLS * x[:, 2] + x[:, 3]]}
    counts = dict(zip(SETS, (rows, judged, judged), strict=True))
    made = {}
    for number, name in enumerate(TASKS):
        x, is_yes = _balanced(rules[name], sum(counts.values()), rng)
        word = np.full((len(x), 1), SYMBOLS + 2 + number)
        tokens = np.concatenate([word, x], axis=1).astype(np.int32)
        answers = np.where(is_yes, YES, NO).astype(np.int32)
        ends = np.cumsum([0, *counts.values()])
        made[name] = {
            part: TaskRows(tokens[i:j], answers[i:j])
            for part, i, j in zip(counts, ends, ends[1:], strict=False)
        }
    return made


def _balanced(
    rule: Rule, number: int, rng: np.random.Generator
) -> tuple[Symbols, Bool[np.ndarray, " n"]]:
    """Draw different rows, yes and no in turn, so that every even stretch of them is balanced."""
    kinds: tuple[list, list] = ([], [])
    seen: set[bytes] = set()
    while min(map(len, kinds)) < number // 2:
        x = rng.integers(0, SYMBOLS, (4 * number, LENGTH))
        for row, is_yes in zip(x, rule(x, rng), strict=True):
            if row.tobytes() not in seen:
                seen.add(row.tobytes())
                kinds[int(is_yes)].append(row)
    pairs = [row for pair in zip(*kinds, strict=False) for row in pair][:number]
    return np.array(pairs), np.arange(number) % 2 == 1
