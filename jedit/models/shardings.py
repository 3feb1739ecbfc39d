"""How the parameters of a large model are split over a mesh.

Weights are split over the mesh's axis "data" for memory (fully sharded data parallelism: a device
gathers a layer's when it computes it), and over "model" for the work (tensor parallelism: queries,
keys, values and the perceptron's hidden layer by their outputs, what reads them by its inputs).
Which axis of a weight is which says the model itself, by tunix's names "fsdp" and "tp".
"""

import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jedit.core.devices import axes_of
from jedit.core.paths import leaves_with_paths
from jedit.models._optional import optional

Shardings = Callable[[str, tuple[int, ...]], Sharding]  # of a parameter's path and shape
AXES = {"fsdp": "data", "tp": "model"}


def default_shardings(module: Any, mesh: Mesh) -> Shardings:
    """Return where each parameter of a model lies on a mesh.

    An axis of a weight that the devices do not divide is left whole, and so are vectors.

    Args:
        module: an NNX module of `jedit.models.families`, of arrays or of their shapes.
        mesh: devices with an axis "data", or "model", or both.

    Returns:
        A function of a parameter's path and shape.

    Raises:
        ValueError: the mesh has neither axis.
    """
    if not set(AXES.values()) & set(mesh.axis_names):
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}; weights are split over 'data', 'model' or "
            "both. Give shardings= to split them otherwise."
        )
    nnx = optional("flax.nnx")
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module, nnx.Param)))
    by_path = dict(leaves_with_paths(specs))

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        split: list[Any] = []
        for size, entry in zip(shape, by_path[path] if len(shape) > 1 else (), strict=False):
            axes = [AXES[name] for name in axes_of(entry) if AXES[name] in mesh.axis_names]
            divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
            split.append(tuple(axes) if axes and divides else None)
        return NamedSharding(mesh, PartitionSpec(*split))

    return place
