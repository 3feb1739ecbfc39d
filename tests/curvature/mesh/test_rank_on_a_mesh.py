"""Leading eigenvectors on eight devices, with axes of both types, against those on one."""

import os
import socket
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
specs = {"w": P("data", "model"), "b": P(), "v": P("model", "data")}
gradient = {n: rng.normal(size=x.shape) for n, x in params.items()}
key = jax.random.key(0)

def computed(params, batch, streamed):
    how = Factorize(rank=4, streamed=streamed)
    first = jedit.estimate(jedit.kfac(apply, Categorical(), factorize=how), params, batch, key=key)
    # The second pass starts from the first, which lies where the params do.
    how = dataclasses.replace(how, start=first)
    second = jedit.estimate(jedit.kfac(apply, Categorical(), factorize=how), params, batch, key=key)
    tree = {n: jax.device_put(x, params[n].sharding) for n, x in gradient.items()}
    solved = [jedit.solve(c, tree, damping=0.1) for c in (first, second)]
    if streamed:
        corrected = jedit.ekfac(apply, Categorical(), second)
        corrected = jedit.estimate(corrected, params, batch, key=key)
        solved.append(jedit.solve(corrected, tree, damping=0.1))
        solved.append(jedit.project(jedit.null_space(first, threshold=0.9), tree))
    return first, solved

alone = {n: jnp.asarray(x) for n, x in params.items()}
for streamed in (False, True):
    expected = computed(alone, Batch(jnp.asarray(inputs)), streamed)[1]
    for kind in ("Auto", "Explicit"):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType[kind],) * 2)
        placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in params.items()}
        rows = jax.device_put(inputs, NamedSharding(mesh, P("data")))
        curvature, found = computed(placed, Batch(rows), streamed)
        factors = [f for f in curvature.factors.values() if f.form == "leading"]
        assert len(factors) == 4
        for factor in factors:
            pieces = {x.data.shape[1] for x in factor.basis.addressable_shards}
            divides = factor.dimension % 8 == 0
            assert pieces == {factor.dimension // (8 if divides else 1)}, pieces
            assert factor.basis.sharding.mesh.axis_types == mesh.axis_types
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert len(one.sharding.device_set) == 8
            scale = np.abs(np.asarray(other)).max()
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-8 * scale)

# So many of them are found among all eigenvectors, by which the devices take turns.
from jedit.curvature.mesh import eigenbases
where, eigenpairs = set(), eigenbases.eigenpairs

def watched(matrix, *how):
    where.update(matrix.devices())
    return eigenpairs(matrix, *how)

eigenbases.eigenpairs = watched
how = jedit.kfac(apply, Categorical(), factorize=Factorize(rank=13))
expected = jedit.estimate(how, alone, Batch(jnp.asarray(inputs)), key=key)
assert not where
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in params.items()}
rows = Batch(jax.device_put(inputs, NamedSharding(mesh, P("data"))))
found = jedit.estimate(how, placed, rows, key=key)
assert len(where) == 4, where
_, planned = how.planned(placed, rows)
for name, factor in expected.factors.items():
    assert found.factors[name].form == factor.form == "leading"
    for one, other, shape in zip(
        *map(jax.tree.leaves, (found.factors[name], factor, planned.factors[name])), strict=True
    ):
        assert one.sharding.is_equivalent_to(shape.sharding, one.ndim), (name, one.sharding)
        assert one.shape == shape.shape == other.shape
        if one.ndim == 3:  # eigenvectors have no sign
            one, other = (np.asarray(x) @ np.swapaxes(np.asarray(x), 1, 2) for x in (one, other))
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-8)
print("agreed")
"""


def test_a_mesh_has_what_one_device_has():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.split() == ["agreed"], done.stderr[-3000:]


FAILURE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jedit.curvature.eigenbases import Moment
from jedit.curvature.mesh import eigenbases

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
eigenpairs = eigenbases.eigenpairs

def failing(matrix, *how):
    if jax.process_index() == 1 and matrix.shape == (12, 12):
        raise np.linalg.LinAlgError("did not converge")
    return eigenpairs(matrix, *how)

eigenbases.eigenpairs = failing

def moment(d, block):
    one, place = np.eye(d)[None].repeat(3, 0), NamedSharding(mesh, P(None, "data", "model"))
    return Moment(jax.make_array_from_callback(one.shape, place, lambda i: one[i]), block, "")

moments = {"a": moment(16, "w"), "b": moment(12, "v"), "c": moment(8, "v")}
try:
    eigenbases.factorize_all(moments)
except FloatingPointError as error:
    print(error, "because of", repr(error.__cause__))
"""


def test_what_fails_in_one_process_is_raised_in_all():
    """Of three layers the turn of one comes on a device of the other process, where none fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", FAILURE, address, str(i)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=100) for process in running]
    finally:
        for process in running:
            process.kill()
    # Gloo tells on the same stream of its connections.
    told = [out.splitlines()[-1].split(" because of ") for out, _ in said]
    start = "the eigendecomposition of the curvature of 'v' (layers "
    assert told[0][0].startswith(start), said
    assert told[0][0] == told[1][0]
    assert [cause for _, cause in told] == ["None", "LinAlgError('did not converge')"]
