"""`jedit ledger`: list, apply, revert and verify what a ledger records."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from jaxtyping import PyTree

from jedit.checkpoint import DamagedError, Ledger
from jedit.checkpoint.disk import check_room, temporary_folder
from jedit.checkpoint.entry import Entry
from jedit.cli.checks import UsageError

CONFIG = "config.json"  # a Hugging Face folder has one


@dataclass(frozen=True)
class LedgerOptions:
    """List, apply, revert or verify the edits that a ledger records."""

    action: tyro.conf.Positional[Literal["list", "apply", "revert", "verify"]]
    """list: a table of all records; apply: write the edited model of --base to --out; revert: take
    ENTRY back, from the next apply on; verify: check every byte, exit code 1 if one is wrong."""
    ledger: tyro.conf.Positional[Path]
    """The ledger's folder."""
    entry: tyro.conf.Positional[int | None] = None
    """With revert: number of the edit."""
    base: Path | None = None
    """With apply: the model of the ledger, a Hugging Face folder or one that orbax wrote."""
    out: Path | None = None
    """With apply: a new folder like --base."""
    upto: int | None = None
    """With apply: the ledger as it was after this entry; None: all of it."""
    rebase: bool = False
    """With apply: take another base than the ledger's, a newer one, knowingly."""
    head: str | None = None
    """With verify: a seal that `verify` printed at some time; it must still be in the chain."""


def ledger(options: LedgerOptions, command: str) -> int:
    """Do what `jedit ledger`'s options say; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    del command
    try:
        return run_ledger(options)
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(str(error)) from None


def run_ledger(options: LedgerOptions) -> int:
    """Do what the options say, with the errors of the library; return the exit code.

    Raises:
        ValueError: a mistake that the user can mend.
        OSError: a folder cannot be written to.
    """
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        ledger = Ledger(options.ledger)
        if options.action == "list":
            # Rows of a table stay rows where there is no terminal.
            wide = console if console.is_terminal else Console(width=180)
            wide.print(_table(ledger.entries))
        elif options.action == "verify":
            entries = ledger.verify(head=options.head)
            console.print(f"{len(entries)} records, all whole. Head: {ledger.head}")
        elif options.action == "revert":
            if options.entry is None:
                raise ValueError("revert needs the number of an entry: jedit ledger revert DIR 3")
            entry = ledger.revert(options.entry)
            console.print(f"Entry {options.entry} is reverted, by entry {entry.number}.")
        else:
            _apply(ledger, options)
            console.print(f"Edited model: {options.out}")
    except DamagedError as error:
        console.print(f"broken: {error}")
        return 1
    return 0


def load_params(folder: Path) -> PyTree:
    """Load the parameters of a Hugging Face folder, or of one that orbax wrote.

    Raises:
        ValueError: the folder is neither.
    """
    if (folder / CONFIG).is_file():
        from jedit.models import load_model

        return load_model(folder)[1]
    import orbax.checkpoint as ocp

    if not (folder / "_METADATA").is_file():
        raise ValueError(f"{folder}: is neither a Hugging Face folder nor one that orbax wrote")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(folder.absolute())
        metadata = getattr(metadata, "item_metadata", metadata)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            getattr(metadata, "tree", metadata),
        )
        return checkpointer.restore(folder.absolute(), like)


def _apply(ledger: Ledger, options: LedgerOptions) -> None:
    if options.base is None or options.out is None:
        raise ValueError("apply needs --base and --out")
    out = options.out
    if out.exists():
        raise ValueError(f"{out}: is there already; remove it, or give another --out")
    check_room(out.absolute().parent, 0)
    base = load_params(options.base)
    params = ledger.params(base, options.upto, rebase=options.rebase)
    if (options.base / CONFIG).is_file():
        from jedit.models import save_model

        save_model(params, out, source=options.base)
        return
    import orbax.checkpoint as ocp

    # orbax writes in the background: renamed only when it is done, so that `out` is whole or
    # absent.
    with temporary_folder(out.absolute().parent) as new, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(new / "params", params)
        checkpointer.wait_until_finished()
        (new / "params").rename(out)


def _table(entries: tuple[Entry, ...]) -> Any:
    from rich.table import Table

    table = Table(box=None)
    for heading in ("entry", "", "date", "method", "rows", "seed", "settings", "effect"):
        table.add_column(heading, justify="right" if heading in ("entry", "rows") else "left")
    for entry in entries:
        state = "active" if entry.is_active else "reverted"
        if entry.target is not None:
            state = f"reverts {entry.target}"
        cells = [str(entry.number), state, entry.date, entry.method, str(len(entry.request))]
        cells.append("" if entry.seed is None else str(entry.seed))
        cells += [json.dumps(dict(x)) if x else "" for x in (entry.settings, entry.effect)]
        # Somebody else's text is no markup, and has no control characters for a terminal.
        table.add_row(*(_printable(cell) for cell in cells))
    return table


def _printable(text: str) -> Any:
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "?" for c in text))
