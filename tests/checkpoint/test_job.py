"""Long jobs go on to the bit: after an exception, and after SIGKILL at any moment."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jedit
from jedit.checkpoint import DamagedError
from tests.checkpoint.jobs import ESTIMATOR, NUM_KILLS, estimate, loop, to_bytes
from tests.conftest import COMPILE_FLAGS, ROOT


class Stopped(Exception):
    pass


def broken_off(folder, at=13):
    """A loop that ended by an exception after `at` steps, saved at every third."""
    seen = []

    def stop(state, _):
        seen.append(state.step)
        if state.step >= at:
            raise Stopped

    with pytest.raises(Stopped):
        loop(jedit.Checkpoint(folder, every=3), every=1, callback=stop)
    return seen


def saves(folder):
    return sorted(x.name for x in folder.iterdir() if x.name != "lock")


def test_a_loop_goes_on_to_the_bit(tmp_path):
    whole = loop(jedit.Checkpoint(tmp_path / "whole", every=3), every=1, callback=lambda *_: None)
    assert broken_off(tmp_path / "job")[-1] == 13
    assert saves(tmp_path / "job") == ["step-000000009", "step-000000012"]
    seen = []
    parts = loop(
        jedit.Checkpoint(tmp_path / "job", every=3),
        every=1,
        callback=lambda state, _: seen.append(state.step),
    )
    assert seen == list(range(13, 25))
    assert to_bytes(parts) == to_bytes(whole)
    assert whole[1]["loss"].shape == (24,)
    # Done before: nothing is computed, the same comes back.
    again = loop(
        jedit.Checkpoint(tmp_path / "job", every=3),
        every=1,
        callback=lambda *_: pytest.fail("begun"),
    )
    assert to_bytes(again) == to_bytes(whole)


def test_saving_changes_nothing(tmp_path):
    """With the same calls of the compiled loop: the callback's."""
    bare = loop(None, every=3, callback=lambda *_: None)
    saved = loop(jedit.Checkpoint(tmp_path / "job", every=6), every=3, callback=lambda *_: None)
    assert to_bytes(saved) == to_bytes(bare)


def test_an_estimate_goes_on_to_the_bit(tmp_path):
    whole = estimate(None)
    with pytest.raises(KeyboardInterrupt):
        estimate(jedit.Checkpoint(tmp_path / "job", every=5), stop=17)
    assert saves(tmp_path / "job") == ["step-000000010", "step-000000015"]
    assert to_bytes(estimate(jedit.Checkpoint(tmp_path / "job", every=5))) == to_bytes(whole)
    assert saves(tmp_path / "job") == ["step-000000020", "step-000000024"]


def test_another_job_is_refused(tmp_path):
    folder = tmp_path / "job"
    broken_off(folder)
    look = {"every": 1, "callback": lambda *_: None}
    for changed in ({"seed": 1}, {"key": jax.random.key(9)}, {"batch_size": 5}):
        with pytest.raises(ValueError, match="was begun with other parameters, data, settings"):
            loop(jedit.Checkpoint(folder, every=3), **{**look, **changed})
    with pytest.raises(ValueError, match="is of 'loop', not of 'estimate'"):
        estimate(jedit.Checkpoint(folder, every=3))
    with pytest.raises(ValueError, match="must be a multiple of the callback's, got 3 and 2"):
        loop(jedit.Checkpoint(folder, every=3), every=2, callback=lambda *_: None)
    with pytest.raises(ValueError, match="every must be at least 1"):
        jedit.Checkpoint(folder, every=0)


def test_other_batches_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        estimate(jedit.Checkpoint(tmp_path, every=5), stop=17)
    with pytest.raises(ValueError, match="with other data in its first 15 steps"):
        estimate(jedit.Checkpoint(tmp_path, every=5), seed=1)
    with pytest.raises(ValueError, match="is of 15 batches or more, got 9"):
        estimate(jedit.Checkpoint(tmp_path, every=5), num_batches=9)


def test_a_damaged_save_is_named_and_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        estimate(jedit.Checkpoint(tmp_path, every=5), stop=17)
    path = tmp_path / "step-000000015/arrays/1"
    raw = path.read_bytes()
    for spoilt in (raw[:-1], raw[:-1] + bytes([raw[-1] ^ 4])):
        path.write_bytes(spoilt)
        with pytest.raises(DamagedError, match=str(path)):
            estimate(jedit.Checkpoint(tmp_path, every=5))


def test_one_process_at_a_job(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is at this job"):
            estimate(jedit.Checkpoint(tmp_path, every=5))


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(100, 0, 2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="its disk has 1,048,576 left"):
        estimate(jedit.Checkpoint(tmp_path, every=5))


def test_a_disk_that_fills_up_is_not_silent(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jedit.checkpoint.job.seal_folder", full)
    with pytest.raises(OSError, match="No space left"):
        estimate(jedit.Checkpoint(tmp_path, every=5))
    assert saves(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_an_unwritable_folder_is_found_before_the_work():
    with pytest.raises(OSError, match="/proc/self/job: cannot be written to"):
        estimate(jedit.Checkpoint("/proc/self/job", every=5))


def test_what_would_not_come_back_as_it_is(tmp_path):
    weak = jnp.full(3, 0.5)
    estimator = ESTIMATOR._replace(
        init=lambda *_: (jnp.asarray(1.5), weak), update=lambda state, *_: state
    )
    batch = jedit.Batch(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"1: is weakly typed, .* \(3,\)"):
        jedit.estimate(
            estimator,
            jnp.zeros(3),
            [batch],
            key=jax.random.key(0),
            checkpoint=jedit.Checkpoint(tmp_path, every=1),
        )


def test_killed_at_twenty_moments(tmp_path):
    """Twelve kills of a loop, eight of an estimate, at random moments, many of them in a save."""
    out = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.jobs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "XLA_FLAGS": COMPILE_FLAGS,
        },
    )
    assert out.returncode == 0, out.stderr[-3000:]
    found = json.loads(out.stdout.splitlines()[-1])
    assert sum(job["kills"] for job in found.values()) == NUM_KILLS, found
    for name, job in found.items():
        peace = json.loads((tmp_path / f"{name}-peace.json").read_text())
        for i, starts in enumerate(job["starts"], 1):
            killed = tmp_path / f"{name}-killed-{i}"
            assert json.loads(killed.with_suffix(".json").read_text()) == peace
            assert starts == sorted(starts), found  # no save is lost
            assert len(saves(killed)) == 2
    assert any(len(set(starts)) > 2 for job in found.values() for starts in job["starts"]), found
    assert sum(job["in_save"] for job in found.values()) > 2, found
