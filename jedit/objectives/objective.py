"""What all objectives have in common: one call, and what some of them cannot do without."""

from collections.abc import Callable
from typing import TypeVar, cast

from jaxtyping import Array, Float

from jedit.core.arguments import check_batch
from jedit.core.batch import Batch

Given = TypeVar("Given")

Value = tuple[Float[Array, ""], dict[str, Array]]
"""The scalar to be lowered, and scalars beside it that a history shows."""

Objective = Callable[..., Value]
"""`(apply, params, forget, retain=None, reference=None) -> Value`, hashable.

forget and retain are the rows of one step, reference the params before unlearning.  Any function
with these arguments is one; those of this folder are values: equal ones compile once.
"""


def needed(reference: Given | None, objective: object) -> Given:
    """Return the reference that an objective cannot do without.

    Raises:
        ValueError: the reference is None.
    """
    if reference is None:
        name = type(objective).__name__
        raise ValueError(f"{name} needs `reference`, the params before unlearning; got None")
    return reference


def kept_rows(retain: Batch | None) -> Batch:
    """Return the retain rows that an objective cannot do without.

    Raises:
        TypeError: there are none, or they are no batch.
    """
    check_batch(retain, "retain")
    return cast(Batch, retain)
