"""What all objectives have in common: one call, and what some of them cannot do without."""

from collections.abc import Callable
from typing import TypeVar

from jaxtyping import Array, Float

Given = TypeVar("Given")

Value = tuple[Float[Array, ""], dict[str, Array]]
"""The scalar to be lowered, and scalars beside it that a history shows."""

Objective = Callable[..., Value]
"""`(apply, params, forget, retain=None, reference=None) -> Value`, hashable.

forget and retain are the rows of one step, reference the params before unlearning.  Any function
with these arguments is one; those of this folder are values: equal ones compile once.
"""


def needed(given: Given | None, objective: object, what: str) -> Given:
    """Return an argument that an objective cannot do without.

    Raises:
        ValueError: it is None.
    """
    if given is None:
        raise ValueError(f"{type(objective).__name__} needs {what}; got None")
    return given


REFERENCE = "`reference`, the params before unlearning"
RETAIN = "`retain`, rows that are to be kept"
