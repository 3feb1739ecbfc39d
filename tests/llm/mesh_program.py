"""A folder loaded over eight devices, edited and saved; a process, or two of four devices each.

Run by `test_mesh`: `mesh_program KIND FOLDER [ADDRESS PROCESS]`, KIND "auto" or "explicit".
The folder has `source`, and gets `saved` and, of the first process, `found.npz`.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jedit
from jedit.core.paths import parameter_paths
from jedit.models import load_model, save_model

TOKENS = np.random.default_rng(0).integers(0, 37, (8, 11)).astype(np.int32)


def held(array):
    """Bytes of an array on this process's first device."""
    device = jax.local_devices()[0]
    return sum(s.data.nbytes for s in array.addressable_shards if s.device == device)


def change(path, shape):
    """Another change of each parameter, the same in every process."""
    return 0.1 * np.random.default_rng(len(path)).normal(size=shape)


def main(kind, folder, address=None, process="0"):
    folder = Path(folder)
    if address is not None:
        jax.distributed.initialize(address, num_processes=2, process_id=int(process))
    axes = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes,) * 2)
    apply, params, _ = load_model(folder / "source", mesh=mesh)
    leaves = dict(parameter_paths(params))
    for path, leaf in leaves.items():
        is_small = leaf.ndim == 1 or "router" in path  # of which tunix says nothing
        assert is_small or held(leaf) < leaf.nbytes, path
    # All there is on this device, what loading may have left behind included.
    on_first = sum(held(array) for array in jax.live_arrays())
    assert on_first < 0.4 * sum(leaf.nbytes for leaf in leaves.values()), on_first

    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
    logits = jax.jit(apply)(params, tokens)
    blocks = {
        path: jax.device_put(jnp.asarray(change(path, leaf.shape), jnp.float32), leaf.sharding)
        for path, leaf in leaves.items()
    }
    edited = jedit.apply_edit(params, jedit.Edit(blocks))
    for path, leaf in parameter_paths(edited):
        assert leaf.sharding.is_equivalent_to(leaves[path].sharding, leaf.ndim), path
    batch = jedit.Batch(tokens, jnp.roll(tokens, -1, axis=1))
    kfac = jedit.kfac(
        apply, jedit.likelihoods.Categorical(), select="layers/1/.*(down_proj|o_proj)"
    )
    curvature = jedit.estimate(kfac, params, [batch], key=jax.random.key(0))
    found = {"logits": logits, "trace": jedit.trace(curvature)}
    found = {name: multihost_utils.process_allgather(x, tiled=True) for name, x in found.items()}
    save_model(edited, folder / "saved", source=folder / "source")
    if process == "0":
        np.savez(folder / "found.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
