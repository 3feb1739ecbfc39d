"""How values show themselves in a notebook or a traceback: shapes and sizes, and few numbers.

A leaf: every folder may use it, and it knows of nothing. What is shown is never computed from a
traced value, so that printing works under every transformation.
"""

import dataclasses
import functools
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

MAX_NUMBERS = 8  # of an array that is shown itself
MAX_ROWS = 24  # of a table of parameters
MAX_TEXT = 60


def described(value: Any) -> str:
    """Return what a value is, short enough for a sentence."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if is_array(value):
        return f"an array {value.dtype}{list(value.shape)}"
    return with_article(type(value).__name__)


def is_array(value: Any) -> bool:
    """Say whether a value has a shape and a dtype, if it is no more than that of an array."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def with_article(name: str) -> str:
    """Put "a" or "an" before a name."""
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def short_repr(self: Any) -> str:
    """Return the `repr` of a named tuple or dataclass: its fields, each in few characters."""
    if dataclasses.is_dataclass(self):
        names = [field.name for field in dataclasses.fields(self)]
    else:
        names = self._fields
    fields = (f"{name}={short(getattr(self, name))}" for name in names)
    return f"{type(self).__name__}({', '.join(fields)})"


def short(value: Any) -> str:
    """Show a value in few characters: an array of many numbers by its dtype and shape."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _short_array(value)
    if isinstance(value, functools.partial):
        return f"partial({short(value.func)})"
    if isinstance(value, Mapping) and len(value) > 3:
        return f"{{{len(value)} entries{_size(value)}}}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {short(x)}" for k, x in value.items()) + "}"
    if type(value) in (list, tuple) and len(value) > 3:
        return f"({len(value)} entries{_size(value)})"
    if type(value) in (list, tuple):
        return "(" + ", ".join(map(short, value)) + ")"
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__.replace(".<locals>", "")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"{value[:MAX_TEXT]!r}..."
    text = repr(value)
    is_short = len(text) <= 2 * MAX_TEXT and "\n" not in text
    return text if is_short else f"<{type(value).__name__}>"


def is_concrete(array: Any) -> bool:
    """Say whether an array's numbers can be looked at here and now."""
    if isinstance(array, Tracer) or not isinstance(array, jax.Array):
        return isinstance(array, np.ndarray)
    return not array.is_deleted() and array.is_fully_addressable


def num_megabytes(tree: Any) -> float:
    """Return what the arrays of a tree take, in units of 10⁶ bytes."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "size") and hasattr(x, "dtype")]
    return sum(x.size * x.dtype.itemsize for x in leaves) / 1e6


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Set rows, the first of them headings, as lines of even columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def html_table(rows: Sequence[Sequence[str]], below: Iterable[str] = ()) -> str:
    """Set rows as a table for a notebook, with lines below it; all text is escaped."""
    heading, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = ["<table>", "<tr>" + "".join(f"<th>{cell}</th>" for cell in heading) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    lines += ["</table>", *(f"<div>{html.escape(line)}</div>" for line in below)]
    return "\n".join(lines)


def _short_array(array: Any) -> str:
    form = f"{array.dtype}[{','.join(map(str, array.shape))}]"
    is_key = isinstance(array, jax.Array) and jax.numpy.issubdtype(array.dtype, jax.dtypes.extended)
    if is_key or not is_concrete(array) or not 0 < array.size <= MAX_NUMBERS:
        return form
    numbers = np.asarray(array)
    if numbers.dtype.kind not in "biuf":  # bfloat16 and its like
        numbers = numbers.astype(np.float64)
    text = np.array2string(numbers, precision=4, separator=", ")
    return form if "\n" in text else text


def _size(tree: Any) -> str:
    megabytes = num_megabytes(tree)
    return f", {megabytes:.3g} MB" if megabytes else ""
