"""Edits, curvatures and long jobs on the disk: whole, checked, and bit by bit as they were.

    save_edit, load_edit, save_curvature, load_curvature       a value in a folder
    Checkpoint                                                 a long job that can be broken off
    Ledger                                                     the edits that a model consists of

All three write sealed folders: a `manifest.json`, which says what the folder holds and the SHA-256
of every file, and `arrays/0`, `arrays/1`, ..., the bytes of one array each. Nothing in them is ever
unpickled or run, and anything can read them:

    numpy.fromfile("edit/arrays/0", "float32").reshape(3, 2)   dtype and shape are in the manifest

A folder appears by one rename when all of it is on the disk, so that a process that is killed, or a
disk that fills, leaves the one before or none, and never half of one.

Several processes of one `jax.distributed` program, which see one file system, make every call that
writes together: each writes the parts of arrays that its devices hold, the first one the manifest
and the name, and all see one outcome. What they have written reads the same anywhere.
"""

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
