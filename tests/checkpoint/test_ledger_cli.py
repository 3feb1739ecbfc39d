"""`jedit ledger`: what it prints, writes and returns."""

import hashlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jedit.checkpoint import Ledger
from jedit.cli.ledger import load_params
from jedit.cli.main import main
from jedit.edits import Edit, apply_edit
from tests.checkpoint.trees import numbers


def make_base():
    return {"w": numbers(3, 2, dtype="bfloat16"), "b": {"0": numbers(2)}}


EDITS = [Edit({"w": numbers(3, 2, seed=i)}) for i in (1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base that orbax wrote, and a ledger of two edits of it."""
    folder = tmp_path_factory.mktemp("cli")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "base", make_base())
    ledger = Ledger.create(folder / "ledger", make_base())
    for i, edit in enumerate(EDITS, 1):
        ledger.record(
            edit, request=["a", "b"][:i], method="[red]kfade\x1b[2J", settings={"budget": 0.05}
        )
    return folder


def run(capsys, *arguments):
    code = main(["ledger", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_apply_list_revert_apply_verify(folder, capsys):
    ledger, base = folder / "ledger", folder / "base"
    code, out, _ = run(capsys, "apply", ledger, "--base", base, "--out", folder / "both")
    assert (code, out) == (0, f"Edited model: {folder / 'both'}\n")
    assert_equal(
        load_params(folder / "both"), apply_edit(apply_edit(make_base(), EDITS[0]), EDITS[1])
    )
    assert run(capsys, "revert", ledger, 1)[:2] == (0, "Entry 1 is reverted, by entry 3.\n")
    run(capsys, "apply", ledger, "--base", base, "--out", folder / "second")
    assert_equal(load_params(folder / "second"), apply_edit(make_base(), EDITS[1]))
    code, out, _ = run(capsys, "list", ledger)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["1", "reverted"],
        ["2", "active"],
        ["3", "reverts"],
    ]
    assert "[red]kfade?[2J" in out  # neither markup nor a terminal's command
    code, out, _ = run(capsys, "verify", ledger)
    assert code == 0
    assert out == f"3 records, all whole. Head: {Ledger(ledger).head}\n"
    assert run(capsys, "verify", ledger, "--head", Ledger(ledger).head)[0] == 0
    code, out, _ = run(capsys, "verify", ledger, "--head", hashlib.sha256().hexdigest())
    assert (code, "some were removed" in out) == (1, True)
    path = ledger / "entries/000002/arrays/0/0.0"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = run(capsys, "verify", ledger)
    assert (code, out.startswith(f"broken: {path}: has ")) == (1, True)


def assert_equal(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_the_user_can_mend(folder, capsys):
    ledger, base = folder / "ledger", folder / "base"
    for arguments, sentence in [
        (("revert", ledger), "revert needs the number of an entry"),
        (("revert", ledger, 9), "there is no entry 9"),
        (("apply", ledger, "--base", base), "apply needs --base and --out"),
        (("apply", ledger, "--base", base, "--out", base), "is there already"),
        (("apply", ledger, "--base", ledger, "--out", folder / "x"), "neither a Hugging Face"),
    ]:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert sentence in err
        assert err.startswith("jedit: ")
    assert not (folder / "x").exists()
    code, out, _ = run(capsys, "verify", folder)
    assert (code, "is no ledger" in out) == (1, True)
