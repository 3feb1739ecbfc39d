"""`--mesh data=4,model=2`: over how many devices a model and its rows are split."""

import math
import re
from typing import TYPE_CHECKING

from jedit.cli.checks import UsageError, shortened

if TYPE_CHECKING:
    from jax.sharding import Mesh

AXES = ("data", "model")  # those over which `load_model` splits a folder's weights
_SIZE = re.compile(r"([a-z]+)=([0-9]{1,6})")


def mesh_axes(text: str) -> dict[str, int]:
    """Return the axes that a text such as "data=4,model=2" names, with their sizes.

    Raises:
        UsageError: the text is of another form, names another axis or one twice, or a size is zero.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        match = _SIZE.fullmatch(part.strip())
        if match is None:
            raise UsageError(
                f"--mesh {shortened(text)}: is not of the form data=4,model=2 (or one of the two)."
            )
        name, size = match[1], int(match[2])
        if name not in AXES:
            raise UsageError(
                f"--mesh {shortened(text)}: there is no axis {name}; give data, model."
            )
        if name in axes:
            raise UsageError(f"--mesh {shortened(text)}: names the axis {name} twice.")
        if not size:
            raise UsageError(f"--mesh {shortened(text)}: the axis {name} must be at least 1.")
        axes[name] = size
    return axes


def mesh_of(text: str) -> "Mesh":
    """Make the mesh of a text, of the first devices of this process.

    Raises:
        UsageError: what `mesh_axes` refuses, or more devices than there are.
    """
    import jax

    axes = mesh_axes(text)
    wanted, devices = math.prod(axes.values()), jax.devices()
    if wanted > len(devices):
        raise UsageError(
            f"--mesh {text}: takes {wanted} devices, and there are {len(devices)} "
            f"({devices[0].platform})."
        )
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
        devices=devices[:wanted],
    )
