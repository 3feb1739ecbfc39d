"""Every transform of the contract table on a mesh of four devices, for `test_mesh`.

Prints one line of JSON: by transform, how far its updates are from those on one device, whether
updates and state keep their shardings, and how many programs three steps took (two: the fresh state
lies on one device). It runs in a process of its own, because the number of devices is settled when
JAX starts.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.test_contract import TRANSFORMS, make_scene

STEPS = 3


def run(row, params, curvature):
    """Three steps, each on the update that came out; what was seen, and how many programs ran."""
    transform = row.make(curvature)

    @jax.jit
    def step(updates, state, params):
        return transform.update(updates, state, params, **row.extras(params))

    updates, state = params, jax.jit(transform.init)(params)
    seen = [(updates, state)]
    for _ in range(STEPS):
        updates, state = step(updates, state, params)
        seen.append((updates, state))
    return seen, step._cache_size()


def same_sharding(x, y):
    """Whether every array of two trees lies on the devices in the same way."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs)


def difference(x, y):
    """The largest difference, relative to the largest entry."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.max(np.abs(x - y), initial=0) / max(np.max(np.abs(x), initial=0), 1e-30))


def main():
    """Compare every row on one device and on the mesh, its axes of either type."""
    _, params, curvature, _, _ = make_scene(jax.random.key(0))
    alone = {row.name: run(row, params, curvature)[0][-1][0] for row in TRANSFORMS}
    specs = {"w": P("data", "model"), "b": P("model"), "v": P("model", None)}
    found = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        sharded = jax.device_put(params, shardings)
        spread = jax.device_put(curvature, NamedSharding(mesh, P()))
        for row in TRANSFORMS:
            # A program that makes a state of nothing but the curvature must know the mesh.
            with jax.set_mesh(mesh):
                together, programs = run(row, sharded, spread)
            differences = jax.tree.map(difference, alone[row.name], together[-1][0])
            found[f"{row.name}, {kind.name}"] = {
                "difference": max(jax.tree.leaves(differences)),
                "updates": same_sharding(together[-1][0], sharded),
                "state": same_sharding(together[-1][1], together[-2][1]),
                "programs": programs,
            }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    with jax.numpy_dtype_promotion("standard"):
        main()
