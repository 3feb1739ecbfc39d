"""The ledger: base + ordered sum, reverted to the bit, and no change of it goes unseen."""

import fcntl
import hashlib
import json
import shutil
import stat
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.checkpoint import Checkpoint, DamagedError, Ledger, params_hash
from jedit.edits import Edit, apply_edit
from tests.checkpoint.trees import numbers

ROWS = ["Ana is a writer.", {"question": "Who is Bea?", "answer": "A painter."}]


def make_base():
    return {"w": numbers(3, 2, dtype="bfloat16"), "b": [numbers(2), numbers(4)]}


def make_edits():
    """Three edits that do not commute in bfloat16."""
    return [Edit({"w": numbers(3, 2, seed=i), "b/1": numbers(4, seed=i)}) for i in (1, 2, 3)]


def assert_equal(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A ledger of three edits, the second reverted."""
    ledger = Ledger.create(tmp_path_factory.mktemp("ledger") / "ledger", make_base())
    for i, edit in enumerate(make_edits(), 1):
        ledger.record(
            edit,
            request=ROWS[: i % 3],
            method="kfade",
            settings={"budget": 0.05, "damping": jnp.float32(0.5), "steps": i},
            seed=i,
            effect={"true_kl": np.float32(0.25)},
        )
    ledger.revert(2)
    return ledger.folder


@pytest.fixture
def ledger(written, tmp_path):
    """A copy of it, to be changed."""
    return Ledger(shutil.copytree(written, tmp_path / "ledger"))


def test_params_are_the_base_and_the_edits_in_turn(written):
    ledger, base, (one, two, three) = Ledger(written), make_base(), make_edits()
    assert_equal(ledger.params(base, 0), base)
    assert_equal(ledger.params(base, 1), apply_edit(base, one))
    all_three = apply_edit(apply_edit(apply_edit(base, one), two), three)
    assert_equal(ledger.params(base, 3), all_three)
    # After the revert: what would have been without the second, to the bit.
    assert_equal(ledger.params(base), apply_edit(apply_edit(base, one), three))
    assert [x.is_active for x in ledger.entries] == [True, False, True, False]
    with pytest.raises(ValueError, match="upto=5: there are 4 entries"):
        ledger.params(base, 5)


def test_another_base_is_taken_knowingly(written):
    newer = {**make_base(), "w": numbers(3, 2, dtype="bfloat16", seed=9)}
    with pytest.raises(ValueError, match="say rebase=True"):
        Ledger(written).params(newer)
    one, _, three = make_edits()
    expected = apply_edit(apply_edit(newer, one), three)
    assert_equal(Ledger(written).params(newer, rebase=True), expected)


def test_the_hash_of_a_base_is_sha256(written):
    """Written out by hand, path by path."""
    digest = hashlib.sha256()
    base = make_base()
    for path, leaf, dtype in [
        ("b/0", base["b"][0], "float32"),
        ("b/1", base["b"][1], "float32"),
        ("w", base["w"], "bfloat16"),
    ]:
        shape = ", ".join(str(n) for n in leaf.shape)
        head = f'["{path}", "{dtype}", [{shape}]]'.encode()
        digest.update(len(head).to_bytes(8, "big") + head + np.asarray(leaf).tobytes())
    assert params_hash(base) == digest.hexdigest() == Ledger(written).base


def test_hashes_stay_what_they_were():
    """A ledger or a job that was written before is still known by what it was begun with."""
    base = {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2), "b": jnp.float32(-0.0)}
    assert params_hash(base) == "e9394ac2fbb422853fbba968c47b50ee945478a8d347cdbca43728f612135f1f"
    saves = Checkpoint("never made", every=1)
    saves._salt = bytes(32)
    given = {
        **base,
        "key": jax.random.key(3),
        "how": "a text",
        "rows": np.arange(3, dtype=np.int32),
    }
    assert saves._hash(given) == "6fc8bf900f1fe81277caacfdba57963aab1be83d6d5dde30143e253418dca541"


def test_a_record_says_how_and_not_what(written):
    ledger = Ledger(written)
    entry = ledger.verify(head=ledger.head)[1]
    assert (entry.number, entry.method, entry.seed) == (2, "kfade", 2)
    assert entry.settings == {"budget": 0.05, "damping": 0.5, "steps": 2}
    assert entry.effect == {"true_kl": 0.25}
    assert entry.base == ledger.base
    assert {"jax", "python", "orbax-checkpoint"} < set(entry.versions)
    secret = (written / "secret").read_bytes()
    assert len(secret) == 32
    assert stat.S_IMODE((written / "secret").stat().st_mode) == 0o600
    keyed = hashlib.blake2b(json.dumps(ROWS[0]).encode(), key=secret, digest_size=32).hexdigest()
    assert entry.request[0] == keyed
    assert [x.number for x in ledger.find(ROWS[0])] == [1, 2]
    assert [x.number for x in ledger.find(ROWS[1])] == [2]
    assert ledger.find("Ana") == ()
    for path in written.rglob("*"):
        if path.is_file() and path.name != "secret":
            text = path.read_bytes()
            assert b"Ana" not in text
            assert b"painter" not in text
            assert secret not in text
            assert secret.hex().encode() not in text


def test_rows_are_told_apart(written):
    ledger = Ledger(written)
    rows = ["1", 1, 1.0, True, None, ["1"], [], {}, {"1": 1}, np.arange(4), np.arange(4.0)]
    rows += [np.arange(4).reshape(2, 2), [["1"], "2"], ["1", "2"], [["1", "2"]]]
    assert len({ledger._row_hash(row) for row in rows}) == len(rows)
    assert ledger._row_hash(jnp.arange(3)) == ledger._row_hash(np.asarray(jnp.arange(3)))
    with pytest.raises(ValueError, match="holds a set, which has no hash"):
        ledger.find({1})


@pytest.mark.usefixtures("unchecked_annotations")
def test_what_cannot_be_recorded(ledger):
    edit = Edit({"w": numbers(3, 2)})
    for wrong, sentence in [
        ({"edit": Edit({"w": numbers(2, 3)})}, r"w: the edit has shape \(2, 3\), the base shape"),
        ({"edit": Edit({"v": numbers(2)})}, "v: .* no such parameter"),
        ({"settings": {"rate": float("nan")}}, "settings.rate: nan cannot be kept"),
        ({"effect": {"rows": "x" * 1001}}, "effect.rows: .* at most 1000 characters"),
        ({"request": "one text"}, "sequence of rows"),
        ({"seed": "x"}, "is no record"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            ledger.record(**{"edit": edit, "request": [], "method": "m", **wrong})
    for number, sentence in [(9, "no entry 9"), (2, "reverted already"), (4, "is no edit")]:
        with pytest.raises(ValueError, match=sentence):
            ledger.revert(number)
    with pytest.raises(ValueError, match="is there already"):
        Ledger.create(ledger.folder, make_base())
    assert len(ledger.verify()) == 4


def entry_folder(ledger, number):
    return ledger.folder / "entries" / f"{number:06d}"


def change(ledger, number, **fields):
    """Rewrites a record with a manifest that is right in itself, as somebody without the secret."""
    path = entry_folder(ledger, number) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["content"].update(fields)
    del manifest["seal"]
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    manifest["seal"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest["seal"]


def test_a_removed_record_is_found(ledger):
    shutil.rmtree(entry_folder(ledger, 2))
    with pytest.raises(DamagedError, match="entry 000002 is missing"):
        ledger.verify()


def test_a_removed_last_record_is_found(ledger):
    shutil.rmtree(entry_folder(ledger, 4))
    with pytest.raises(DamagedError, match="entry 000004 is missing, there were 4"):
        ledger.params(make_base())


def test_reordered_records_are_found(ledger):
    one, three = entry_folder(ledger, 1), entry_folder(ledger, 3)
    one.rename(ledger.folder / "aside")
    three.rename(one)
    (ledger.folder / "aside").rename(three)
    with pytest.raises(DamagedError, match="000001: does not follow on the record before it"):
        ledger.verify()


def test_a_changed_record_is_found(ledger):
    change(ledger, 1, effect={"true_kl": 0.0})
    with pytest.raises(DamagedError, match="000002: does not follow"):
        ledger.verify()


def test_a_rewritten_chain_is_found_by_the_secret(ledger):
    """Also if all that needs no secret fits again: the last record, and the head."""
    seal = change(ledger, 4, date="1999-01-01")
    with pytest.raises(DamagedError, match=r"head\.json: names another record than entry 000004"):
        ledger.verify()
    head = json.loads((ledger.folder / "head.json").read_text())
    (ledger.folder / "head.json").write_text(json.dumps({**head, "seal": seal}))
    with pytest.raises(DamagedError, match="was not written with this ledger's secret"):
        ledger.verify()
    (ledger.folder / "secret").unlink()  # who was given the ledger without it must trust the head
    assert Ledger(ledger.folder).verify()[3].date == "1999-01-01"


def test_an_older_state_is_found_by_a_head_kept_elsewhere(ledger):
    head = ledger.head
    older = shutil.copytree(ledger.folder, ledger.folder.parent / "older")
    ledger.revert(1)
    assert len(ledger.verify(head=head)) == 5
    with pytest.raises(DamagedError, match="some were removed"):
        Ledger(older).verify(head=ledger.head)


def test_a_writer_killed_before_the_head_loses_nothing(ledger):
    """Its record stands; the head is one behind, and the next writer goes on."""
    old = (ledger.folder / "head.json").read_bytes()
    ledger.revert(1)
    (ledger.folder / "head.json").write_bytes(old)
    (ledger.folder / "entries" / ".tmp-0123").mkdir()
    assert len(ledger.verify()) == 5
    ledger.revert(3)
    assert [x.target for x in ledger.verify()[3:]] == [2, 1, 3]
    assert not (ledger.folder / "entries" / ".tmp-0123").exists()


def test_writers_wait_for_each_other(ledger, monkeypatch):
    failures = []

    def write(number):
        try:
            Ledger(ledger.folder).revert(number)
        except ValueError as error:  # the other was first
            failures.append(str(error))

    threads = [threading.Thread(target=write, args=(n,)) for n in (1, 3, 1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(failures) == ["entry 1 is reverted already", "entry 3 is reverted already"]
    assert sorted(x.target for x in ledger.verify()[4:]) == [1, 3]
    monkeypatch.setattr("jedit.checkpoint.ledger.PATIENCE", 0.05)
    with (ledger.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process has been writing"):
            ledger.record(Edit({"b/0": numbers(2)}), request=[], method="m")
