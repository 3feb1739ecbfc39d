"""Leading eigenvectors on eight devices, with axes of both types, against those on one."""

import os
import subprocess
import sys

CODE = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update("jax_enable_x64", True)
import jedit
from jedit.core.batch import Batch
from jedit.curvature import Factorize
from jedit.curvature.likelihoods import Categorical

def apply(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return hidden @ params["v"]

rng = np.random.default_rng(0)
params = {n: rng.normal(size=s) / 5 for n, s in {"w": (64, 48), "b": (48,), "v": (48, 40)}.items()}
inputs = rng.normal(size=(64, 64)) * np.arange(1, 65) ** -0.8
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType[KIND],) * 2)
specs = {"w": P("data", "model"), "b": P(), "v": P("model", "data")}
placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in params.items()}
rows = jax.device_put(inputs, NamedSharding(mesh, P("data")))
alone = {n: jnp.asarray(x) for n, x in params.items()}
gradient = {n: rng.normal(size=x.shape) for n, x in params.items()}
key = jax.random.key(0)
number = 0
for streamed in (False, True):
    found, start = [], None
    for params, batch in ((alone, Batch(jnp.asarray(inputs))), (placed, Batch(rows))):
        how = Factorize(rank=4, streamed=streamed)
        first = jedit.estimate(
            jedit.kfac(apply, Categorical(), factorize=how), params, batch, key=key
        )
        # The second pass starts from the first, which lies on the mesh.
        how = dataclasses.replace(how, start=first)
        second = jedit.estimate(
            jedit.kfac(apply, Categorical(), factorize=how), params, batch, key=key
        )
        corrected = jedit.estimate(
            jedit.ekfac(apply, Categorical(), second), params, batch, key=key
        )
        tree = {n: jax.device_put(x, params[n].sharding) for n, x in gradient.items()}
        solved = [jedit.solve(c, tree, damping=0.1) for c in (first, second, corrected)]
        projector = jedit.null_space(first, threshold=0.9)
        found.append([solved, jedit.project(projector, tree)])
        if params is placed:
            for name, factor in first.factors.items():
                if factor.form != "leading":
                    continue
                number += 1
                pieces = {x.data.shape[1] for x in factor.basis.addressable_shards}
                divides = factor.dimension % 8 == 0
                assert pieces == {factor.dimension // (8 if divides else 1)}, (name, pieces)
            for one in jax.tree.leaves(solved[0]):
                assert len(one.sharding.device_set) == 8
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        scale = np.abs(np.asarray(one)).max()
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-8 * scale)
assert number == 8, number
print("agreed")
"""


def check(kind):
    done = subprocess.run(
        [sys.executable, "-c", CODE.replace("KIND", repr(kind))],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
            + " --xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.split() == ["agreed"], done.stderr[-3000:]


def test_auto_axes():
    check("Auto")


def test_explicit_axes():
    check("Explicit")
