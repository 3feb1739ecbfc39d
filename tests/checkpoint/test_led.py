"""What several processes owe each other at one folder, each of them a thread at a store of ours."""

import contextlib
import errno
import threading
import time

import jax
import numpy as np
import pytest
from jax._src import distributed

import jedit
from jedit.checkpoint import DamagedError, disk, processes, sealed
from jedit.checkpoint import ledger as ledger_module
from jedit.checkpoint.entry import with_activity

COUNT = 3


class Store:
    """The part of the store of `jax.distributed` that messages go through."""

    def __init__(self):
        self.known, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.known
            self.known[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.known, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no such key")
            return self.known[key]

    def key_value_delete(self, prefix):
        with self.changed:
            self.known = {k: v for k, v in self.known.items() if not k.startswith(prefix)}


class Calls(dict):
    """How many calls each of the processes has made, by their name."""

    def __init__(self, here):
        super().__init__()
        self.here = here

    def get(self, name, default=None):
        return super().get((self.here.rank, name), default)

    def __setitem__(self, name, value):
        super().__setitem__((self.here.rank, name), value)


@pytest.fixture
def run(monkeypatch):
    """Return a function that makes a call as each of the processes; what each got or raised."""
    here = threading.local()
    jax.devices()  # the backend would ask the store as well, if it were made later
    monkeypatch.setattr(distributed.global_state, "client", Store())
    monkeypatch.setattr(jax, "process_count", lambda: COUNT if hasattr(here, "rank") else 1)
    monkeypatch.setattr(jax, "process_index", lambda: getattr(here, "rank", 0))
    monkeypatch.setattr(processes, "_calls", Calls(here))

    def all_of(call, ranks=range(COUNT)):
        outcomes = {}

        def one(rank):
            here.rank = rank
            try:
                outcomes[rank] = call(rank)
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(outcomes) == list(ranks), "a process waits for ever"
        return [outcomes[rank] for rank in ranks]

    return all_of


@pytest.fixture
def ledger(tmp_path):
    """A ledger of two edits."""
    model = jedit.Ledger.create(tmp_path / "ledger", {"w": np.ones((2, 3), np.float32)})
    for scale in (1, 2):
        edit = jedit.Edit({"w": jax.numpy.full((2, 3), scale, np.float32)})
        model.record(edit, request=[scale], method="a method")
    return model


def assert_all(outcomes, kind, text):
    for outcome in outcomes:
        assert type(outcome) is kind, outcomes
        assert text in str(outcome)
    assert len(outcomes) == COUNT


def test_processes_take_back_one_edit(run, ledger):
    """No process is told that its call succeeded when it was another's that did."""
    assert_all(
        run(lambda rank: ledger.revert(2 if rank == 1 else 1)),
        ValueError,
        "process 1: writing to ",
    )
    assert len(ledger.entries) == 2
    found = run(lambda _: ledger.revert(1))
    assert [(x.number, x.target, x.seal) for x in found] == [(3, 1, ledger.head)] * COUNT


@pytest.mark.parametrize("failing", [0, 1])
def test_nobody_writes_when_the_first_cleans_up(run, tmp_path, monkeypatch, failing):
    """Whoever has failed before: a file behind the removal would leave half a folder."""
    begun, ended, removed = [], [], []

    def write_parts(*_):
        rank = jax.process_index()
        if rank == failing:
            raise OSError(errno.ENOSPC, "full", "a file")
        begun.append(rank)
        time.sleep(0.15 * (1 + rank))
        ended.append(rank)
        return [6]

    @contextlib.contextmanager
    def temporary_folder(parent):
        try:
            with disk.temporary_folder(parent) as new:
                yield new
        finally:
            removed.append(sorted(ended))

    monkeypatch.setattr(processes, "write_parts", write_parts)
    monkeypatch.setattr(sealed, "temporary_folder", temporary_folder)
    edit = jedit.Edit({"w": jax.numpy.ones((2, 3), np.float32)})
    assert_all(run(lambda _: jedit.save_edit(edit, tmp_path / "edit")), OSError, "full: 'a file'")
    assert removed == [sorted(begun)] == [[x for x in range(COUNT) if x != failing]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hidden", [[], [2], [0, 1, 2]])
def test_every_array_is_in_the_manifest(run, tmp_path, monkeypatch, hidden):
    """Also where the list of a folder's files, as a network's disk tells it, lacks some."""
    walk = sealed.walk

    def late(folder):
        found = walk(folder)
        return {} if jax.process_index() in hidden else found

    edit = jedit.Edit({name: jax.numpy.ones((2, 3), np.float32) for name in "abcde"})
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "walk", late)
        assert run(lambda _: jedit.save_edit(edit, tmp_path / "edit")) == [None] * COUNT
    read = jedit.load_edit(tmp_path / "edit")
    assert read.blocks.keys() == edit.blocks.keys()


def test_a_file_of_another_size_is_no_save(run, tmp_path, monkeypatch):
    """What one process has hashed is compared with what was to be written."""
    hashes = sealed.sha256

    def short(path):
        if path.name == "1":
            path.write_bytes(path.read_bytes()[:-1])
        return hashes(path)

    monkeypatch.setattr(sealed, "sha256", short)
    edit = jedit.Edit({name: jax.numpy.ones((2, 3), np.float32) for name in "ab"})
    found = run(lambda _: jedit.save_edit(edit, tmp_path / "edit"))
    assert_all(found, OSError, "has 23 bytes, 24 were written")
    assert list(tmp_path.iterdir()) == []


def test_all_read_the_same_records(run, ledger, monkeypatch):
    """Of a ledger that another program writes to while they read."""
    read = jedit.Ledger._entries

    def entries(self, *, is_complete):
        # The first has read before the last record was written, the others afterwards.
        found = read(self, is_complete=is_complete)
        return found if jax.process_index() else with_activity(found[:2])

    ledger.revert(1)
    monkeypatch.setattr(jedit.Ledger, "_entries", entries)
    base = {"w": jax.numpy.ones((2, 3), np.float32)}
    for found in run(lambda _: ledger.params(base)):
        np.testing.assert_array_equal(found["w"], 4)
    found = run(lambda rank: ledger.params(base, upto=1 if rank == 2 else 2))
    assert_all(found, ValueError, "sees other records, or was given another base or another `upto`")


@pytest.mark.parametrize("name", ["read_manifest", "read_sealed"])
def test_damage_that_one_process_reads_stops_all(run, ledger, monkeypatch, name):
    """Of a record, or of its arrays; else the others would wait in the edit's programs."""
    read = getattr(ledger_module, name)

    def damaged(*given):
        if jax.process_index() == 1:
            raise DamagedError("a file: was changed")
        return read(*given)

    monkeypatch.setattr(ledger_module, name, damaged)
    base = {"w": jax.numpy.ones((2, 3), np.float32)}
    found = run(lambda _: ledger.params(base))
    assert_all(found, DamagedError, "process 1: a file: was changed")


@pytest.mark.parametrize("slow", [0, 1])
def test_who_has_come_may_take_longer_than_patience(run, monkeypatch, slow):
    """Large parts take hours to write; no process is told that one who is at it did not come."""
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setattr(processes, "LOOK", 0.05)

    def part(given):
        if jax.process_index() == slow:
            time.sleep(0.6)
        return given + jax.process_index()

    def work(spread):
        time.sleep(0.6)
        return spread(1)

    assert run(lambda _: processes.led("taking long", work, part)) == [[1, 2, 3]] * COUNT


def test_who_does_not_come_is_named(run, monkeypatch):
    """By all that wait for it, in about the patience of one."""
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    begun = time.monotonic()
    found = run(lambda _: processes.together("a call", lambda: 1), ranks=[0, 2])
    for error in found:
        assert isinstance(error, TimeoutError)
        assert "process 0 has waited 0.3 s for process 1; every process must" in str(error)
    (error,) = run(lambda _: processes.together("another", lambda: 1), ranks=[0])
    assert "for process 1; every process must make this call" in str(error)
    (error,) = run(lambda _: processes.together("a third", lambda: 1), ranks=[1])
    assert "process 1 has waited 0.3 s for process 0; every process must" in str(error)
    assert time.monotonic() - begun < 20


def test_who_has_gone_again_is_not_waited_for(run, monkeypatch):
    """The first comes when the patience of the others is over."""
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setattr(processes, "LOOK", 0.05)

    def call(rank):
        time.sleep(0 if rank else 1)
        return processes.together("a call", lambda: 1)

    first, *others = run(call)
    assert "process 1: a call: process 1 has waited 0.2 s for process 0" in str(first)
    assert [type(x) for x in (first, *others)] == [TimeoutError] * COUNT
