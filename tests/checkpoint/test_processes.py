"""Two processes of four devices: what they write together, and jobs that were killed go on.

`process_program` does it all in processes of its own; the oracle is one process with one device.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jedit.checkpoint import DamagedError, arrays, processes
from tests.conftest import COMPILE_FLAGS, ROOT

TIMEOUT = 600
DEATHS = {  # who kills itself; a process may be ended by another's death before its own
    "both in a save of the sums": (0, 1),
    "the second in its part": (1,),
    "the first before the name": (0,),
    "both in a save of the loop": (0, 1),
}


def run(name, folder):
    """What a program tells, and its standard error."""
    try:
        with socket.socket() as free:
            free.bind(("localhost", 0))
    except OSError as error:
        pytest.skip(f"processes need sockets to find each other: {error}")
    out = subprocess.run(
        [sys.executable, "-m", f"tests.checkpoint.{name}", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": COMPILE_FLAGS,
        },
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1]), out.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What happened, and the folder with the numbers."""
    folder = tmp_path_factory.mktemp("processes")
    found, printed = run("process_program", folder)
    for name in ("peace", "killed", "2 x 2", "one process", "alone"):
        assert all(x[:2] == [0, False] for x in found[name]["ended"]), printed[-6000:]
    return found, folder


def numbers(folder, name, rank=0, under=""):
    with np.load(folder / f"{name}-out-{rank}.npz") as found:
        return {x.removeprefix(under): found[x] for x in found if x.startswith(under)}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        scale = np.abs(x).max()
        np.testing.assert_allclose(found[name] / scale, x / scale, 0, 1e-12, err_msg=name)


def test_both_end_when_one_is_killed(ran):
    """The other does not wait for ever; what was whole on the disk stays, and nothing else."""
    found, _ = ran
    for name, dead in DEATHS.items():
        ends = [tuple(x[:2]) for x in found[name]["ended"]]
        assert (signal.SIGKILL, True) in [ends[rank] for rank in dead], (name, ends)
        # Killed as well, or ended by JAX or by an error, but by itself: it had two minutes.
        assert (0, False) not in ends, (name, ends)
    assert all(seconds < 60 for one in found.values() for *_, seconds in one["ended"]), found
    saved = [x["saves"]["estimate"][-1] for x in found.values() if "saves" in x]
    assert [int(x[-1]) for x in saved] == [1, 2, 4, 4]
    assert found["both in a save of the loop"]["saves"]["loop"] == ["step-000000002"]


def test_killed_jobs_go_on_to_the_bit(ran):
    """Killed on meshes with explicit axes as well, and gone on with on one with Auto axes."""
    _, folder = ran
    peace = numbers(folder, "peace")
    for name, rank in (("peace", 1), ("killed", 0), ("killed", 1)):
        other = numbers(folder, name, rank)
        assert other.keys() == peace.keys()
        for path, x in peace.items():
            assert (other[path].dtype, other[path].shape) == (x.dtype, x.shape)
            assert other[path].tobytes() == x.tobytes(), (name, rank, path)


def test_on_other_devices_they_go_on_to_rounding(ran):
    _, folder = ran
    oracle = numbers(folder, "alone", under="oracle/")
    assert oracle["history/loss"].shape == (6,)
    assert len({float(x) for x in oracle["history/loss"]}) == 6
    assert_close(numbers(folder, "peace"), oracle)
    for rank in (0, 1):
        assert_close(numbers(folder, "2 x 2", rank), oracle)
    assert_close(numbers(folder, "one process"), oracle)
    assert_close(numbers(folder, "alone", under="one device/"), oracle)


@pytest.mark.float64
def test_leading_eigenvectors(tmp_path):
    """Iterated, streamed and refined: killed in a save, gone on with, and as one process has them.

    Also where the decompositions of the second process come out otherwise than the first's.
    """
    found, printed = run("rank_program", tmp_path)
    assert found["saves"] == ["job/iterated/step-000000001"]
    assert (signal.SIGKILL, True) in [tuple(x[:2]) for x in found["killed"]]
    assert all(x[:2] == [0, False] for x in found["two"] + found["one"]), printed[-6000:]
    expected = numbers(tmp_path, "one")
    # Three ways: eigenvalues and eigenvectors of four factors, and what they solve for.
    assert len(expected) == 3 * (2 * 4 + 2)
    for rank in (0, 1):
        assert_close(numbers(tmp_path, "two", rank), expected)


def test_all_see_the_same(ran):
    _, folder = ran
    told = [json.loads((folder / f"peace-out-{rank}.json").read_text()) for rank in (0, 1)]
    late, left = told[0].pop("alone"), told[0].pop("left")
    seen = told[0]
    assert seen == told[1]
    assert "process 0 has waited 0.5 s for process 1; every process must make this call" in late
    assert [x[0] for x in seen["records"]] == [1, 2, 3]
    expected = {
        "there is one": ["ValueError", "edit: is there already; remove it"],
        "another edit": ["ValueError", "process 1: saving "],
        "reverted": ["ValueError", "entry 1 is reverted already"],
        "another model": ["ValueError", "to put the edits on another base, say rebase=True"],
        "other data": ["ValueError", "was given something else than the first one"],
        "another part": ["RuntimeError", "process 1: list index out of range"],
    }
    assert seen.pop("explicit") is True  # the same hash in the context of explicit axes
    assert seen.pop("offloaded") is True
    assert seen.keys() == {"records", *expected}
    for name, (kind, text) in expected.items():
        assert seen[name][0] == kind, seen[name]
        assert text in seen[name][1]
    # Nothing of what failed is left, nor of what one process began alone.
    assert left == ["begun", "curvature", "edit", "explicit", "job", "ledger", "model.npz"]
    assert [x.name for x in (folder / "values/begun").iterdir()] == ["lock"]


def test_one_process_reads_what_two_have_written(ran):
    _, folder = ran
    assert json.loads((folder / "alone-out-0.json").read_text()) == {"hash": True}
    read = numbers(folder, "alone", under="read/")
    with np.load(folder / "values/model.npz") as found:
        for name in found:
            assert found[name].tobytes() == read[f"params/{name}"].tobytes()
    np.testing.assert_array_equal(read["params/down"], 0)  # of the edit that was not taken back
    for name, x in numbers(folder, "peace", under="factors/").items():
        assert read[f"curvature/factors/{name}/matrix"].tobytes() == x.tobytes()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("no"), ValueError, "process 3: no"),
        (DamagedError("x: is missing"), DamagedError, "process 3: x: is missing"),
        (UnicodeError("no"), ValueError, "process 3: no"),
        (KeyError("no"), RuntimeError, "process 3: 'no'"),
        (OSError(errno.ENOSPC, "full", "f"), OSError, "[Errno 28] process 3: full: 'f'"),
        (TimeoutError(errno.ETIMEDOUT, "busy"), TimeoutError, "[Errno 110] process 3: busy"),
        (TimeoutError("late"), TimeoutError, "process 3: late"),
    ],
)
def test_errors_travel(error, kind, text):
    told = json.loads(json.dumps(processes._told(error)))
    found = processes._error(told, "process 3: ")
    assert type(found) is kind
    assert str(found) == text


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((), P()), ((0, 4), P()), ((8, 6), P("x")), ((8, 6), P(None, "y")), ((8, 6, 2), P("x", "y"))],
)
def test_parts_fill_the_file(shape, spec, tmp_path):
    """Whatever way an array is cut, the file holds its memory, row by row."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    mesh = jax.make_mesh((1, 1), ("x", "y"))
    # One device has all of an array; the cuts are made by hand.
    count = {"x": 4, "y": 2}
    cut = [count.get(axis, 1) for axis in (*spec, *(None,) * (len(shape) - len(spec)))]
    (tmp_path / arrays.ARRAYS).mkdir()
    whole = jax.device_put(jnp.asarray(values), NamedSharding(mesh, spec))
    assert arrays.write_parts(tmp_path, [whole]) == [values.size]
    path = tmp_path / arrays.ARRAYS / "0"
    if values.size:
        assert path.read_bytes() == values.tobytes()
        path.unlink()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT)
        for place in np.ndindex(*cut):
            sizes = [n // c for n, c in zip(shape, cut, strict=True)]
            index = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, sizes, strict=True))
            arrays._write_part(handle, index, np.asarray(values[index]), shape)
        os.close(handle)
        assert path.read_bytes() == values.tobytes()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5), (1, 1, 300)])
@pytest.mark.parametrize("most", [4, 40, 10**6])
def test_blocks_are_the_memory(shape, most, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK_BYTES", most)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    found = []
    for begins, sizes in arrays._blocks(shape, 4):
        part = values[tuple(slice(b, b + n) for b, n in zip(begins, sizes, strict=True))]
        assert part.nbytes <= max(most, 4)
        found.append(part.tobytes())
    assert b"".join(found) == values.tobytes()


@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_of_a_large_part_in_the_hosts_memory_nothing_is_copied(memory, monkeypatch, tmp_path):
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 40)
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0], memory_kind=memory)
    values = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
    x = jax.device_put(values, place)
    ((index, part),) = arrays._own_parts(x)
    assert index == (slice(0, 30), slice(0, 7))
    assert part.ctypes.data == x.unsafe_buffer_pointer()
    (tmp_path / arrays.ARRAYS).mkdir()
    assert arrays.write_parts(tmp_path, [x]) == [values.size]
    assert (tmp_path / arrays.ARRAYS / "0").read_bytes() == values.tobytes()
