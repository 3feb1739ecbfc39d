"""Where in the user's program an equation comes from."""

import pathlib

from jax.extend import source_info_util

_LIBRARIES = ("/jax/", "/jaxlib/", "/flax/", "/haiku/", "/equinox/", "/jaxtyping/")
_HERE = str(pathlib.Path(__file__).parent)


def source_line(eqn, default: str = "") -> str:
    """`file:line` of the innermost frame outside of JAX, the layer libraries and this folder.

    An equation inside a cached jitted function has no such frame; it gets `default`, the line of the
    call around it.
    """
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        name = frame.file_name
        if _HERE not in name and not any(part in name for part in _LIBRARIES):
            return f"{pathlib.Path(name).name}:{frame.line_num}"
    return default or source_info_util.summarize(eqn.source_info) or "unknown line"
