"""Edits: what is added to which parameters, dense or thin, one or a stack of them."""

from jedit.edits.compress import Product, Truncation, compress, truncate, truncate_all
from jedit.edits.edit import (
    CastLoss,
    Edit,
    apply_edit,
    cast_report,
    edit_between,
    edit_norms,
    revert_edit,
)
from jedit.edits.low_rank import Delta, LowRank, as_parameter, dense
from jedit.edits.stack import sum_edits
from jedit.edits.without_top_fraction import without_top_fraction

__all__ = [
    "Delta",
    "CastLoss",
    "Edit",
    "LowRank",
    "apply_edit",
    "as_parameter",
    "cast_report",
    "compress",
    "dense",
    "edit_between",
    "edit_norms",
    "revert_edit",
    "sum_edits",
    "Product",
    "Truncation",
    "truncate",
    "truncate_all",
    "without_top_fraction",
]
