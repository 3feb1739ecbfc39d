"""Blocks of arrays that are cut over eight devices, as several processes hash them.

Run by `test_many_devices`, in a process of its own. Prints by name whether the blocks are the
array's memory, and the largest array of the program that brings one, over a device's part.
"""

import contextlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jedit.checkpoint import arrays

# The first axis is cut as FSDP cuts it, or stacked layers; or the last one, or all.
CASES = {
    "rows": ((64, 24), P("data"), "float32"),
    "columns": ((24, 64), P(None, ("data", "model")), "bfloat16"),
    "both": ((16, 24), P("model", "data"), "float64"),
    "layers": ((8, 5, 12), P(("model", "data")), "int16"),
    "all": ((4, 6, 8), P("data", None, "model"), "complex64"),
    "truth": ((64, 12), P("data", None), "bool"),
    "vector": ((200,), P("data"), "uint32"),
    "long": ((2, 96), P("model", "data"), "complex128"),
}
MOST = 128  # bytes of a block: parts are longer and shorter


def host():
    """Parameters whose bits a sum of floats would not keep."""
    rng, found = np.random.default_rng(0), {}
    for name, (shape, _, dtype) in CASES.items():
        x = rng.integers(0, 2**8, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
        x = x % 2 == 1 if dtype == "bool" else x
        found[name] = x.view(jnp.dtype(dtype))[..., 0]
        if dtype in ("float32", "float64", "bfloat16"):
            found[name].reshape(-1)[:3] = [np.nan, -0.0, np.inf]
    return found


def largest_share(x):
    """The largest array of the program that brings a block, over that and a device's part."""
    begins, sizes = next(iter(arrays._blocks(x.shape, x.dtype.itemsize)))
    lowered = arrays._block.lower(x, np.array(begins, np.int32), sizes, x.sharding)
    made = re.findall(r"\b[a-z]+(\d*)\[([\d,]+)\]", lowered.compile().as_text())
    # Truth values are bytes; nothing else has no number of bits.
    sizes = [int(bits or 8) / 8 * np.prod([int(n) for n in s.split(",")]) for bits, s in made]
    least = max(MOST, *(shard.data.nbytes for shard in x.addressable_shards))
    assert x.nbytes > 2 * least  # so that the whole would be seen
    return max(sizes) / least


def main():
    """Bring the same parameters from wherever they lie, in whatever context."""
    jax.config.update("jax_enable_x64", True)
    arrays.BLOCK_BYTES = MOST
    params, found = host(), {}
    meshes = {
        kind.name: jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        for kind in (AxisType.Auto, AxisType.Explicit)
    }
    meshes["other"] = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    for name, x in params.items():
        placed = {
            kind: jax.device_put(x, NamedSharding(meshes[kind], CASES[name][1]))
            for kind in ("Auto", "Explicit")
        }
        found[f"{name}, share"] = largest_share(placed["Auto"])
        for kind, put in placed.items():
            for context in (None, *meshes):
                within = (
                    contextlib.nullcontext() if context is None else jax.set_mesh(meshes[context])
                )
                with within:
                    same = b"".join(arrays._brought(put)) == x.tobytes()
                found[f"{name}, {kind} within {context}"] = same
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
