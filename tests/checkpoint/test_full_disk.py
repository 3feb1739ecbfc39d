"""A disk that fills during a save, and what a process that was killed has left behind."""

import errno
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.checkpoint import Checkpoint, Ledger, load_edit, save_curvature, save_edit
from jedit.checkpoint.disk import temporary_folder
from jedit.curvature.types import Curvature
from jedit.edits import Edit
from jedit.training import Watch, fit

# Several arrays: when one fails, others are still to be written.
VALUES = {f"w{i}": np.random.default_rng(i).normal(size=(120, 120)) for i in range(6)}
EDIT = Edit({path: jnp.asarray(x, jnp.float32) for path, x in VALUES.items()})

ROWS = jnp.ones((4, 1), jnp.float32)


@pytest.fixture
def small_disk():
    """No file may become larger than 16 KiB, as no disk could be filled here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Nor may the cache of compiled programs keep one that is cut off: all later runs would meet it.
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    jax.config.update(name, before)


def record(folder):
    """One more record of the ledger."""
    Ledger(folder / "ledger").record(EDIT, request=["a"], method="none")


def train(folder):
    """A training job that saves its state of six arrays after each step."""

    def loss(params, rows):
        return sum(jnp.sum(x) for x in params.values()) * jnp.sum(rows), {}

    job = Checkpoint(folder / "job", every=1)
    key = jax.random.key(0)
    fit(
        loss,
        optax.sgd(1e-3),
        dict(EDIT.blocks),
        ROWS,
        epochs=3,
        key=key,
        watch=Watch(checkpoint=job),
    )


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: save_edit(EDIT, folder / "edit"),
        lambda folder: save_curvature(
            Curvature({}, {}, jnp.arange(200_000, dtype=jnp.int32) * 7919), folder / "curvature"
        ),
        record,
        train,
    ],
    ids=["edit", "curvature", "ledger", "job"],
)
def test_a_disk_that_fills_says_so_and_keeps_nothing(tmp_path, capfd, request, save):
    Ledger.create(tmp_path / "ledger", dict(EDIT.blocks))
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "lock").touch()
    before = sorted(tmp_path.rglob("*"))
    request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match="File too large, so that nothing was saved") as caught:
        save(tmp_path)
    assert caught.value.errno == errno.EFBIG
    assert str(tmp_path) in caught.value.filename
    assert sorted(tmp_path.rglob("*")) == before
    assert capfd.readouterr() == ("", "")


def leave(folder):
    """What a process leaves in a folder that is killed while it saves."""
    left = folder / ".tmp-0123456789abcdef"
    left.mkdir(mode=0o700)
    (left / "arrays").write_text("somebody's birthday")
    return left


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: save_edit(EDIT, folder / "edit"),
        lambda folder: Ledger.create(folder / "ledger", dict(EDIT.blocks)),
    ],
    ids=["edit", "ledger"],
)
def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path, save):
    left = leave(tmp_path)
    strangers = [tmp_path / ".tmp-mine", tmp_path / ".tmp-0123456789abcdef0"]
    for stranger in strangers:
        stranger.mkdir()
    (tmp_path / ".tmp-fedcba9876543210").symlink_to(strangers[0])
    with temporary_folder(tmp_path) as alive:
        (alive / "file").touch()
        save(tmp_path)
        assert (alive / "file").exists()
    assert not left.exists()
    assert all(stranger.exists() for stranger in strangers)
    assert (tmp_path / ".tmp-fedcba9876543210").is_symlink()


def test_what_a_killed_writer_of_a_ledger_left_is_removed(tmp_path):
    ledger = Ledger.create(tmp_path / "ledger", dict(EDIT.blocks))
    left = leave(tmp_path / "ledger" / "entries")
    (tmp_path / "ledger" / ".tmp-0123456789abcdef").write_text("a head")
    ledger.record(EDIT, request=["a"], method="none")
    assert not left.exists()
    names = {path.name for path in (tmp_path / "ledger").iterdir()}
    assert names == {"base", "entries", "head.json", "lock", "secret"}
    assert len(ledger.verify()) == 1


def test_a_save_after_a_full_disk(tmp_path, request):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match="too large"):
        save_edit(EDIT, tmp_path / "edit")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    save_edit(EDIT, tmp_path / "edit")
    jax.tree.map(np.testing.assert_array_equal, load_edit(tmp_path / "edit"), EDIT)
