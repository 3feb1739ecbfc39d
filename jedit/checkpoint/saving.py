"""Edits and curvatures as folders: written whole or not at all, read only if undamaged.

In several processes, which see one file system, each calls the same function with the same folder
name. Each writes the parts that its devices hold, and each that reads checks every file itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from jedit.checkpoint.arrays import num_bytes, read_arrays
from jedit.checkpoint.disk import check_room
from jedit.checkpoint.json import (
    curvature_from_json,
    curvature_to_json,
    edit_from_json,
    edit_to_json,
)
from jedit.checkpoint.processes import led_writing
from jedit.checkpoint.sealed import MANIFEST, Files, read_sealed, write_sealed
from jedit.core.arguments import check_kind
from jedit.curvature.mesh.placement import block_shardings, with_shardings
from jedit.curvature.types import Curvature
from jedit.edits import Edit

EDIT, CURVATURE = "edit", "curvature"
Tree = TypeVar("Tree")


def save_edit(edit: Edit, folder: str | Path) -> None:
    """Write an edit, bit by bit as it is, to a new folder.

    The folder appears when all of it is on the disk. Only its owner may enter it: an edit is made
    of what is forgotten, and gradients can be inverted.

    Args:
        edit: the edit, dense or thin, one or a stack of them.
        folder: the new folder; nothing may be there yet.

    Raises:
        ValueError: something is there already, or an array has a dtype that is not kept; or another
            process was given another edit.
        OSError: the folder cannot be written to, or has too little room.
        TimeoutError: another process does not make this call.
    """
    check_kind(edit, Edit, "edit", "of `edit_between` or a method")
    _save(edit, Path(folder), EDIT, edit_to_json, edit_from_json)


def load_edit(
    folder: str | Path,
    *,
    like: Edit | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Edit:
    """Read an edit, bit by bit as it was, on these devices or others.

    Every file is compared with its SHA-256 first; no code of the folder's is run, and no file
    outside of it is read. Somebody who may write the folder while it is read is not defended
    against, nor does a hash say who wrote it.

    Args:
        folder: the folder that `save_edit` wrote.
        like: an edit of the same structure made of `jax.ShapeDtypeStruct`s, whose shardings the
            arrays get.
        sharding: the sharding of all arrays; None: they lie on the process's first device.

    Raises:
        ValueError: a file is damaged, or is not what it should be (`DamagedError` names it); or
            `like` is no such edit.
    """
    content, _ = read_sealed(Path(folder), EDIT)
    return read_tree(Path(folder), content, edit_from_json, like=like, sharding=sharding)


def save_curvature(curvature: Curvature, folder: str | Path) -> None:
    """Write a curvature to a new folder, as `save_edit` does an edit.

    Raises:
        ValueError: something is there already, or an array has a dtype that is not kept; or another
            process was given another curvature.
        OSError: the folder cannot be written to, or has too little room.
        TimeoutError: another process does not make this call.
    """
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    _save(curvature, Path(folder), CURVATURE, curvature_to_json, curvature_from_json)


def load_curvature(
    folder: str | Path,
    *,
    like: Curvature | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Curvature:
    """Read a curvature, as `load_edit` does an edit.

    Raises:
        ValueError: a file is damaged, or is not what it should be (`DamagedError` names it); or
            `like` is no such curvature.
    """
    content, _ = read_sealed(Path(folder), CURVATURE)
    placed = {} if like is None else block_shardings(like)
    like = None if like is None else with_shardings(like, {})
    read = read_tree(Path(folder), content, curvature_from_json, like=like, sharding=sharding)
    return with_shardings(read, placed)


def read_tree(
    folder: Path,
    content: Any,
    from_json: Callable[[Any, str], Tree],
    *,
    like: Any = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Tree:
    """Read the arrays of a structure from a sealed folder that was checked.

    Raises:
        ValueError: a file is not what it should be, or `like` has another structure.
    """
    if like is not None and sharding is not None:
        raise ValueError("give like or sharding, one of them")
    empty = from_json(content, str(folder / MANIFEST))
    specs, treedef = jax.tree.flatten(empty)
    shardings: list[Any] = [sharding] * len(specs)
    if like is not None:
        wanted, wanted_treedef = jax.tree.flatten(like)
        if wanted_treedef != treedef:
            raise ValueError(f"{folder}: like has another structure:\n{wanted_treedef}\n{treedef}")
        for spec, other in zip(specs, wanted, strict=True):
            if (spec.shape, spec.dtype) != (other.shape, other.dtype):
                raise ValueError(f"{folder}: holds {spec}, like has {other} in its place")
        shardings = [getattr(x, "sharding", None) for x in wanted]
    placed = [
        jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place)
        for spec, place in zip(specs, shardings, strict=True)
    ]
    read = jax.tree.unflatten(treedef, read_arrays(folder, placed))
    return _in_order(read, empty)


def _save(
    tree: Any,
    folder: Path,
    kind: str,
    to_json: Callable[[Any], dict[str, Any]],
    from_json: Callable[[Any, str], Any],
) -> None:
    content, arrays = to_json(tree), jax.tree.leaves(tree)
    from_json(content, str(folder))  # what could not be read is not written

    def work(write: Callable[[Path], Files]) -> None:
        check_room(folder.parent, num_bytes(arrays))
        write_sealed(folder, kind, content, write)

    led_writing(f"saving {folder}", content, arrays, work)


def _in_order(tree: Any, empty: Any) -> Any:
    """Put a mapping's names, which JAX has sorted, back into the order they were written in."""
    for name in ("blocks", "factors"):
        if hasattr(tree, name):
            values = getattr(tree, name)
            # The dataclass is frozen, and made a moment ago: nobody else has seen it yet.
            object.__setattr__(tree, name, {key: values[key] for key in getattr(empty, name)})
    return tree
