"""A model that says itself how its products lie, on a mesh with explicit axes; prints differences.

Run by `test_many_devices`, in a process with eight devices: K-FADE's edit and its price as on one.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jedit

SPECS = {"w": P(None, "model"), "b": P("model"), "v": P("model", None)}


def apply(params, x, **told):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    # Both sides of the sum are split: JAX asks how the result is to lie.
    return jnp.einsum("bi,io->bo", hidden, params["v"], **told)


def edited(apply, params, retain, forget):
    kfac = jedit.kfac(apply, jedit.likelihoods.Categorical(), fisher="exact")
    curvature = jedit.estimate(kfac, params, [retain], key=jax.random.key(0))
    given = (apply, params, curvature, forget, retain)
    edit, info = jedit.methods.kfade(*given, budget=0.05, ascent=jedit.methods.Ascent(1))
    return jedit.apply_edit(params, edit) | {"true KL": info.true_kl}


if __name__ == "__main__":
    draw = np.random.default_rng(0)
    shapes = {"w": (6, 8), "b": (8,), "v": (8, 4)}
    host = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    rows = jedit.Batch(draw.normal(size=(16, 6)).astype(np.float32), draw.integers(0, 4, 16))
    few = jax.tree.map(lambda x: x[:8], rows)
    expected = edited(apply, host, rows, few)

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params = {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in host.items()}
    sets = jax.device_put((rows, few), NamedSharding(mesh, P("data")))
    told = jax.sharding.explicit_axes(
        lambda p, x: apply(p, x, out_sharding=P("data", None)), in_sharding=(SPECS, P("data", None))
    )
    with jax.set_mesh(mesh):
        found = edited(told, params, *sets)
    for name, spec in SPECS.items():
        assert found[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), host[name].ndim)
    differences = {n: float(np.abs(np.asarray(found[n]) - x).max()) for n, x in expected.items()}
    sys.stdout.write(json.dumps(differences))
