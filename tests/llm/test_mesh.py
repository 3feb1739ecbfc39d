"""A folder on a mesh of eight devices: read in parts, the same numbers, saved in parts."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jedit
from jedit.core.paths import parameter_paths
from jedit.models import load_model, save_model
from tests.conftest import COMPILE_FLAGS, ROOT
from tests.llm.mesh_program import TOKENS, change
from tests.llm.random_folder import write_random

TIMEOUT = 600


def run(kind, folder, processes):
    """The program, in one process of eight devices or two of four."""
    given = [kind, str(folder)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // processes} {COMPILE_FLAGS}"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.llm.mesh_program", *given]
            + ([address, str(i)] if processes > 1 else []),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        )
        for i in range(processes)
    ]
    try:
        for process in running:
            printed, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, printed[-4000:]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize(
    ("family", "kind", "processes"),
    [
        ("llama", "auto", 2),
        ("gemma2", "explicit", 1),  # keys and values are stacked
        pytest.param("qwen3_moe", "auto", 1, marks=pytest.mark.exhaustive),
        pytest.param("mistral", "auto", 1, marks=pytest.mark.exhaustive),
        pytest.param("qwen3", "explicit", 1, marks=pytest.mark.exhaustive),
        pytest.param("gemma3", "auto", 2, marks=pytest.mark.exhaustive),
    ],
)
def test_the_devices_do_not_matter(family, kind, processes, tmp_path):
    source = write_random(family, tmp_path / "source")
    run(kind, tmp_path, processes)
    found = np.load(tmp_path / "found.npz")

    apply, params, _ = load_model(source)
    want = np.asarray(jax.jit(apply)(params, TOKENS))
    assert_allclose(found["logits"], want, rtol=0, atol=2e-5 * np.abs(want).max())
    tokens = jnp.asarray(TOKENS)
    batch = jedit.Batch(tokens, jnp.roll(tokens, -1, axis=1))
    kfac = jedit.kfac(
        apply, jedit.likelihoods.Categorical(), select="layers/1/.*(down_proj|o_proj)"
    )
    curvature = jedit.estimate(kfac, params, [batch], key=jax.random.key(0))
    assert_allclose(found["trace"], jedit.trace(curvature), rtol=1e-3)

    blocks = {
        path: jnp.asarray(change(path, leaf.shape), jnp.float32)
        for path, leaf in parameter_paths(params)
    }
    edited = jedit.apply_edit(params, jedit.Edit(blocks))
    whole = save_model(edited, tmp_path / "whole", source=source)
    for file in whole.iterdir():
        assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes(), file.name


def test_where_each_parameter_lies(tmp_path):
    source = write_random("llama", tmp_path / "source")
    mesh = jax.make_mesh((1,), ("rows",))
    with pytest.raises(ValueError, match=r"axes \('rows',\); weights are split over 'data'"):
        load_model(source, mesh=mesh)
    asked = []
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(path, shape):
        asked.append((path, shape))
        return device

    _, params, _ = load_model(source, shardings=place)
    assert dict(asked) == {path: leaf.shape for path, leaf in parameter_paths(params)}
    with pytest.raises(ValueError, match="give a mesh.* or shardings"):
        load_model(source, mesh=mesh, shardings=place)
