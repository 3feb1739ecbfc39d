"""Saves an edit from a mesh of four devices and reads it on two, for `test_saving`."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jedit
from jedit.edits import Edit

if __name__ == "__main__":
    folder = Path(sys.argv[1]) / "edit"
    devices = jax.devices()
    assert len(devices) == 4
    values = np.arange(48.0, dtype=np.float32).reshape(8, 6) / 7
    four = NamedSharding(jax.make_mesh((4,), ("x",)), P("x"))
    jedit.save_edit(Edit({"w": jax.device_put(values, four)}), folder)
    two = NamedSharding(jax.make_mesh((2,), ("x",), devices=devices[:2]), P(None, "x"))
    like = Edit({"w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=two)})
    for read in (jedit.load_edit(folder, like=like), jedit.load_edit(folder, sharding=two)):
        assert read.blocks["w"].sharding == two
        np.testing.assert_array_equal(np.asarray(read.blocks["w"]), values)
