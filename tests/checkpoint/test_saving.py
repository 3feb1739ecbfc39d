"""Edits and curvatures come back from the disk to the bit, here and on other devices."""

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jedit
from jedit.edits import Edit, LowRank
from tests.checkpoint.trees import PLAIN, assert_same, make_curvature, make_edit, numbers

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one edit."""
    folder = tmp_path_factory.mktemp("saved") / "edit"
    jedit.save_edit(make_edit(), folder)
    return folder


def test_an_edit_comes_back_to_the_bit(saved):
    assert_same(jedit.load_edit(saved), make_edit())


def test_a_curvature_comes_back_to_the_bit(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        jedit.save_curvature(make_curvature(), tmp_path / "new" / "curvature")
    assert caplog.records == []  # nothing for the user to read
    assert_same(jedit.load_curvature(tmp_path / "new" / "curvature"), make_curvature())


def test_a_stack_of_edits_comes_back_to_the_bit(tmp_path):
    stack = jax.tree.map(lambda *x: jnp.stack(x), make_edit(0), make_edit(1))
    jedit.save_edit(stack, tmp_path / "stack")
    assert_same(jedit.load_edit(tmp_path / "stack"), stack)


def test_the_files_are_listed_with_their_hashes(saved):
    """By `find` and hashlib, without the library."""
    manifest = json.loads((saved / "manifest.json").read_text())
    files = {
        str(path.relative_to(saved)): [
            os.path.getsize(path),
            hashlib.sha256(path.read_bytes()).hexdigest(),
        ]
        for path in saved.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert files == manifest["files"]
    assert len(files) == 7  # one for each array that has elements
    assert stat.S_IMODE(saved.stat().st_mode) == 0o700
    assert not any(".tmp-" in path.name for path in saved.parent.iterdir())


def test_what_is_there_is_not_replaced(saved):
    before = (saved / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        jedit.save_edit(make_edit(1), saved)
    assert (saved / "manifest.json").read_bytes() == before


def test_a_broken_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jedit.checkpoint.processes.write_parts", fail)
    with pytest.raises(OSError, match="No space"):
        jedit.save_edit(make_edit(), tmp_path / "edit")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(100, 0, 2**20 + 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr("jedit.checkpoint.saving.write_sealed", lambda *_: pytest.fail("begun"))
    with pytest.raises(OSError, match=r"needs 1,049,056 bytes, its disk has 1,048,676 left"):
        jedit.save_edit(Edit({"x": jnp.zeros(120, jnp.float32)}), tmp_path / "edit")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_an_unwritable_folder_is_found_before_the_work(monkeypatch):
    monkeypatch.setattr("jedit.checkpoint.saving.write_sealed", lambda *_: pytest.fail("begun"))
    with pytest.raises(OSError, match="/proc/self: cannot be written to"):
        jedit.save_edit(make_edit(), "/proc/self/edit")


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="dtype int4 are not kept"):
        jedit.save_edit(Edit({"x": jnp.zeros(2, jnp.int4)}), tmp_path / "edit")
    wrong = LowRank(numbers(1, 2, 2), numbers(1, 2, 2), PLAIN)
    with pytest.raises(ValueError, match=r"a/kernel: .* make no Weight"):
        jedit.save_edit(Edit({"a/kernel": wrong}), tmp_path / "edit")
    assert list(tmp_path.iterdir()) == []


def test_like_must_be_the_same_edit(saved):
    like = jax.eval_shape(lambda: make_edit())
    other = Edit({**like.blocks, "z": jax.ShapeDtypeStruct((3, 2), "bfloat16")})
    with pytest.raises(ValueError, match=r"holds .*\(2, 3\).*like has .*\(3, 2\)"):
        jedit.load_edit(saved, like=other)
    with pytest.raises(ValueError, match="another structure"):
        jedit.load_edit(saved, like=Edit({"z": like.blocks["z"]}))


@pytest.mark.float64
def test_wide_arrays_are_not_cut(tmp_path):
    jedit.save_edit(Edit({"x": jnp.arange(3.0)}), tmp_path / "edit")
    with jax.enable_x64(False), pytest.raises(ValueError, match="set jax_enable_x64"):
        jedit.load_edit(tmp_path / "edit")


def test_another_number_of_devices(tmp_path):
    """Saved on four devices, read on one and on two, by `like` and by a sharding."""
    out = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.mesh", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
    )
    assert out.returncode == 0, out.stderr
    expected = np.arange(48.0, dtype=np.float32).reshape(8, 6) / 7
    read = jedit.load_edit(tmp_path / "edit")
    assert read.blocks["w"].sharding.device_set == {jax.devices()[0]}
    np.testing.assert_array_equal(np.asarray(read.blocks["w"]), expected)
