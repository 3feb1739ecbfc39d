"""Rows over the devices of a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jedit.core.batch import Batch
from jedit.data import batches
from jedit.recipes.fitting import rows_of
from jedit.recipes.folders.settings import Settings

DATA = "data"


def placed(rows: Batch, mesh: Mesh | None) -> Batch:
    """Put rows over the mesh's axis "data", or whole on every device where it does not divide them.

    Args:
        rows: the rows.
        mesh: the devices; None: the default one.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, rows)
    divides = DATA in mesh.axis_names and rows_of(rows) % mesh.shape[DATA] == 0
    spec = PartitionSpec(DATA) if divides else PartitionSpec()
    return jax.device_put(rows, NamedSharding(mesh, spec))


def cut(rows: Batch, settings: Settings) -> list[Batch]:
    """Cut rows into batches of one shape, each over the devices."""
    size = min(settings.batch_size, rows_of(rows))
    return [placed(batch, settings.mesh) for batch in batches(rows, size)]
