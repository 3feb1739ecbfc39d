"""One program on one device, on eight, and in two processes of four: the same numbers.

Each runs in processes of its own, since JAX counts its devices when it starts; `program` also
checks there where everything lies, and that no compiled program makes a whole sharded weight.
"""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import COMPILE_FLAGS, ROOT

TIMEOUT = 900


def start(path, kind, devices, *distributed):
    """One process of the program."""
    return start_module("program", devices, str(path), kind, *distributed)


def start_module(name, devices, *arguments):
    """One process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {COMPILE_FLAGS}"
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.many_devices.{name}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )


def numbers(folder, kind, devices, processes=1):
    """What the program computes, by name."""
    path = folder / "numbers.npz"
    if processes == 1:
        running = [start(path, kind, devices)]
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        running = [start(path, kind, devices, address, str(i), "2") for i in range(processes)]
    try:
        for process in running:
            printed, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, printed[-4000:]
    finally:
        for process in running:
            process.kill()
    with np.load(path) as found:
        return {name: found[name] for name in found}


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    """On one device."""
    return numbers(tmp_path_factory.mktemp("one"), "one", 1)


@pytest.mark.float64
@pytest.mark.parametrize(
    ("kind", "devices", "processes"),
    [  # The second has the axes of both that follow, and each kind of process and of mesh is there.
        pytest.param("fsdp explicit", 8, 1, id="FSDP, explicit axes, in their mesh's context"),
        pytest.param("both", 4, 2, id="both, two processes"),
        pytest.param("fsdp", 8, 1, id="FSDP", marks=pytest.mark.exhaustive),
        pytest.param("tensor", 8, 1, id="tensor parallel", marks=pytest.mark.exhaustive),
        pytest.param("stages", 4, 2, id="split layers", marks=pytest.mark.exhaustive),
    ],
)
def test_the_devices_do_not_matter(kind, devices, processes, on_one, tmp_path):
    found = numbers(tmp_path, kind, devices, processes)
    assert set(found) == set(on_one)
    for name, expected in on_one.items():
        scale = np.max(np.abs(expected), initial=0) or 1
        np.testing.assert_allclose(found[name] / scale, expected / scale, 0, 1e-12, err_msg=name)


@pytest.mark.parametrize("module", ["explicit_model", "explicit_entrances", "explicit_curvatures"])
def test_explicit_axes(module):
    process = start_module(module, 8)
    printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, printed[-4000:]
    for name, difference in json.loads(printed.splitlines()[-1]).items():
        assert difference < 1e-4, name


def test_groups_change_nothing(on_one):
    """Factors taken group by group, and solved with from the host's memory."""
    grouped = {n.removeprefix("grouped/"): x for n, x in on_one.items() if n.startswith("grouped/")}
    assert len(grouped) == 8
    for name, x in grouped.items():
        np.testing.assert_allclose(x, on_one[f"matrix/{name}"], rtol=1e-12, atol=1e-14)
    for name, x in on_one.items():
        if name.startswith("solve offloaded/"):
            solved = on_one[name.replace(" offloaded", "")]
            np.testing.assert_allclose(x, solved, rtol=1e-9, atol=1e-12 * np.abs(solved).max())


def test_damped_factors_are_cut_over_the_devices():
    """Each device holds a part of every inverse, and makes and uses no larger one."""
    process = start_module("factored", 8)
    printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, printed[-4000:]
    found = json.loads(printed.splitlines()[-1])
    for by, seen in found.items():
        for name, number in seen.items():
            # "odd" is split over four devices, and the others over eight.
            limit = 0.25 if name.startswith("share") else 1e-7
            assert number <= limit, (by, name, number)


def test_arrays_are_hashed_and_written_block_by_block():
    """No device makes more of an array than a block, or its own part of it, wherever it is cut."""
    process = start_module("blocks", 8)
    printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, printed[-4000:]
    for name, found in json.loads(printed.splitlines()[-1]).items():
        if name.endswith("share"):
            assert found <= 2, name  # XLA sums 16 bits in 32
        elif name.endswith("writes"):
            # Cut on two axes a row of devices has a part of the rows, or of the layers.
            assert found <= 4, (name, found)
        else:
            assert found is True, name
