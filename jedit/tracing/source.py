"""Where in the user's program an equation comes from."""

import contextlib
import functools
import pathlib
import sys

from jax.extend import source_info_util

# Not the user's: libraries, decorators, this folder, and ("<") code made by run-time checkers.
_LIBRARIES = ("jax", "jaxlib", "flax", "haiku", "equinox", "jaxtyping", "beartype")


def source_line(eqn, default: str = "") -> str:
    """Return `file:line` of the innermost frame outside of JAX, layer libraries and this folder.

    An equation inside a cached jitted function has no such frame; it gets `default`, the line of
    the call around it.
    """
    modules = [sys.modules[name] for name in _LIBRARIES if name in sys.modules]
    skipped = [str(pathlib.Path(path)) + "/" for m in modules for path in m.__path__]
    skipped += [str(pathlib.Path(__file__).parent) + "/", "<"]
    skipped += [contextlib.__file__, functools.__file__]
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith(tuple(skipped)):
            return f"{pathlib.Path(frame.file_name).name}:{frame.line_num}"
    return default or source_info_util.summarize(eqn.source_info) or "unknown line"
