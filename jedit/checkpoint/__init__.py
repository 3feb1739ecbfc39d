"""Edits, curvatures and long jobs on the disk: whole, checked, and bit by bit as they were."""

from jedit.checkpoint.entry import Entry, params_hash
from jedit.checkpoint.job import Checkpoint
from jedit.checkpoint.ledger import Ledger
from jedit.checkpoint.saving import load_curvature, load_edit, save_curvature, save_edit
from jedit.checkpoint.sealed import DamagedError

__all__ = [
    "Checkpoint",
    "DamagedError",
    "Entry",
    "Ledger",
    "load_curvature",
    "load_edit",
    "params_hash",
    "save_curvature",
    "save_edit",
]
