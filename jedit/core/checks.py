"""Checks of what can be told before or after a computation: ranges of numbers, and finiteness.

What is traced passes, since its value is not known; so does None, which stands for "not given".
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from jedit.core.paths import leaves_with_paths


class Range(NamedTuple):
    """A range of the numbers that an argument may be; none of them is infinite or NaN.

    Attributes:
        least: the smallest number allowed.
        most: the largest number allowed.
        is_open: the smallest itself is left out.
        is_whole: only whole numbers are allowed.
    """

    least: float = -math.inf
    most: float = math.inf
    is_open: bool = False
    is_whole: bool = False

    def __str__(self) -> str:
        if self.most < math.inf:
            least = (
                f"above {self.least:g} and at most" if self.is_open else f"from {self.least:g} to"
            )
            return f"be {least} {self.most:g}"
        if self.least == 0 and not self.is_whole:
            return "be positive" if self.is_open else "not be negative"
        return f"be {'above' if self.is_open else 'at least'} {self.least:g}"


FINITE = Range()
POSITIVE = Range(0, is_open=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
POSITIVE_SHARE = Range(0, 1, is_open=True)
COUNT = Range(1, is_whole=True)
COUNT_OR_ZERO = Range(0, is_whole=True)


def check_numbers(allowed: Range, **numbers: Any) -> None:
    """Refuse numbers that are out of their range, by their names.

    Args:
        allowed: the range in which each number has to lie.
        **numbers: by the name that the caller knows: numbers, arrays of them, None, or traced.

    Raises:
        ValueError: a number lies outside, or is NaN or infinite.
        TypeError: an argument is no number.
    """
    for name, given in numbers.items():
        if not is_known(given):
            continue
        value = np.asarray(given)
        is_real = value.dtype == bool or jnp.issubdtype(value.dtype, jnp.number)
        if not is_real or jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise TypeError(f"{name} must be a number, got {given!r} ({type(given).__name__})")
        wide = value.astype(np.float64)
        is_whole = jnp.issubdtype(value.dtype, jnp.integer)
        kind = "be a whole number" if allowed.is_whole else "be a finite number"
        is_above = wide > allowed.least if allowed.is_open else wide >= allowed.least
        for required, holds in (
            (kind, np.isfinite(wide) & (is_whole or not allowed.is_whole)),
            (allowed, is_above & (wide <= allowed.most)),
        ):
            if not holds.all():
                got = repr(given) if value.ndim == 0 else example(value, holds)
                raise ValueError(f"{name} must {required}, got {got}")


def example(values: np.ndarray, holds: np.ndarray) -> str:
    """Return the first value for which something does not hold, and where it stands."""
    place = tuple(int(i) for i in np.argwhere(~holds)[0])
    return f"{values[place]} at {list(place)}"


def is_known(value: Any) -> bool:
    """Say whether a value is given, not traced, and can be read by this process."""
    if value is None or isinstance(value, (Tracer, jax.ShapeDtypeStruct)):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def not_finite(tree: PyTree) -> list[str]:
    """Return the paths of the arrays of a tree that hold NaN or infinity."""
    return [path for path, leaf in leaves_with_paths(tree) if not _is_finite(leaf)]


def check_finite(what: str, tree: PyTree, hint: str | Callable[[], str] = "") -> None:
    """Refuse a tree with NaN or infinity in it, naming the arrays that have it.

    Args:
        what: the tree's name in the message.
        tree: arrays; those that are not real, or traced, pass.
        hint: why that may be, and what to do; a function is called when there is need.

    Raises:
        FloatingPointError: an array holds NaN or infinity.
    """
    paths = not_finite(tree)
    if not paths:
        return
    named = ", ".join(repr(path) for path in paths[:4] if path)
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    why = hint() if callable(hint) else hint
    raise FloatingPointError(
        f"{what} is not finite"
        + (f" at {named}{more}" if named else "")
        + (f": {why}" if why else "")
    )


def rows_not_finite(tree: PyTree) -> list[int]:
    """Return the numbers of the rows, along the first axis of every array, that are not finite."""
    rows: set[int] = set()
    for leaf in jax.tree.leaves(tree):
        if is_known(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and leaf.ndim:
            values = np.isfinite(np.asarray(leaf))
            is_whole = values.all(axis=tuple(range(1, values.ndim)))
            rows |= set(np.flatnonzero(~is_whole).tolist())
    return sorted(rows)


def culprit(params: PyTree, sets: Mapping[str, PyTree]) -> str:
    """Say why something that was computed from parameters and rows is not finite, as a sentence."""
    if paths := not_finite(params):
        return f"the parameters {paths[:4]} are not finite themselves"
    for name, rows in sets.items():
        if numbers := rows_not_finite(rows):
            return f"rows {numbers[:8]} of {name} hold numbers that are not finite"
    return (
        "parameters and rows are finite, so it is computed beyond the range of its dtype, or the "
        "steps before were too large"
    )


def loop_failure(
    losses: Any, first: int, reached: PyTree, start: PyTree, sets: Mapping[str, PyTree]
) -> str:
    """Return where a training loop left the finite numbers, and why, as a sentence.

    Args:
        losses: the losses of the steps taken last.
        first: the number of the first of these steps.
        reached: the parameters after these steps.
        start: the parameters that the loop began with.
        sets: the rows that the loop read, by name.
    """
    values = np.asarray(losses)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        what = f"the loss of step {first + int(wrong[0])} is {values[wrong[0]]}"
    else:
        what = f"step {first + len(values) - 1} left {not_finite(reached)[:4]} not finite"
    return f"{what}, so the loop stopped and returns no parameters: {culprit(start, sets)}"


def _is_finite(leaf: Any) -> bool:
    if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)):
        return True
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return True
    is_here = not isinstance(leaf, jax.Array) or all(d.platform == "cpu" for d in leaf.devices())
    if is_here and is_known(leaf):  # where it lies, and without a program to be compiled
        return bool(np.isfinite(np.asarray(leaf)).all())
    return bool(_all_finite(leaf))


@jax.jit
def _all_finite(leaf: Any) -> Any:
    return jnp.all(jnp.isfinite(leaf))
