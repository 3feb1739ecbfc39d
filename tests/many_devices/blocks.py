"""Blocks of arrays that are cut over eight devices, as several processes hash and write them.

Run by `test_many_devices`, in a process of its own. Prints by name whether the blocks, and the
file that is written, are the array's memory; the largest array of the program that brings a block,
over a device's part; and in how many writes the file was made.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

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
    "half a byte": ((64, 24), P("data", "model"), "int4"),
    "byte": ((24, 64), P(None, "data"), "float8_e4m3fn"),
    "long": ((2, 96), P("model", "data"), "complex128"),
}
MOST = 128  # bytes of a block: parts are longer and shorter


def host():
    """Parameters whose bits a sum of floats would not keep."""
    rng, found = np.random.default_rng(0), {}
    for name, (shape, _, dtype) in CASES.items():
        x = rng.integers(0, 2**8, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
        x = x % 2 == 1 if dtype == "bool" else x % 16 if dtype == "int4" else x
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


def refused(*_):
    raise AssertionError("what is offloaded was brought to the devices whole")


def written(x, most, *, is_view=False):
    """The file of an array, written in blocks of so many bytes, and in how many writes it was.

    A CPU's parts are not cut, unless they are said to be no views, as an accelerator's are not.
    """
    arrays.BLOCK_BYTES, do, count = most, os.pwrite, 0
    view = arrays._in_host_memory
    if not is_view:
        arrays._in_host_memory = lambda part: view(part) if part.nbytes <= most else None

    def counted(*given):
        nonlocal count
        count += 1
        return do(*given)

    os.pwrite = counted
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, arrays.ARRAYS)
            place.mkdir()
            assert arrays.write_parts(Path(folder), [x]) == [x.size]
            return (place / "0").read_bytes(), count
    finally:
        os.pwrite, arrays.BLOCK_BYTES, arrays._in_host_memory = do, MOST, view


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
        spec = CASES[name][1]
        places = {kind: NamedSharding(meshes[kind], spec) for kind in ("Auto", "Explicit")}
        places["host"] = places["Auto"].with_memory_kind("pinned_host")
        placed = {kind: jax.device_put(x, place) for kind, place in places.items()}
        found[f"{name}, share"] = largest_share(placed["Auto"])
        bring = arrays._block
        for kind, put in placed.items():
            is_host = kind == "host"
            arrays._block = refused if is_host else bring
            for context in (None, *meshes):
                with contextlib.nullcontext() if context is None else jax.set_mesh(meshes[context]):
                    same = b"".join(arrays._brought(put)) == x.tobytes()
                    same &= written(put, MOST, is_view=is_host)[0] == x.tobytes()
                found[f"{name}, {kind} within {context}"] = same
        arrays._block = bring
        found[f"{name}, of views"] = written(placed["Auto"], MOST, is_view=True)[0] == x.tobytes()
        _, found[f"{name}, writes"] = written(placed["Auto"], 2**26)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
