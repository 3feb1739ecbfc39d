"""What an edit of a folder's model leaves behind: the folder, the edit, numbers, a record."""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jedit.checkpoint import Checkpoint, Ledger, params_hash, save_edit
from jedit.checkpoint.disk import ABANDONED, temporary_folder
from jedit.data import QaRow
from jedit.edits import Edit
from jedit.models import save_model

EDITED, EDIT, RESULTS, PAGE, JOB = "edited", "edit", "results.json", "index.html", "job"
OURS = {EDITED, EDIT, RESULTS, PAGE, JOB}
SAVED_EVERY = 8  # steps of a walk, or batches of a curvature, between two saves; arbitrary
# What a record of the ledger tells of an edit's effect.
EFFECT = ("method", "before", "after", "true_kl", "predicted_kl", "stopped", "rounded_away")


def check_folder(out: Path, *sources: Path) -> None:
    """Refuse a folder that holds what no run of this kind has written, or what is to be read.

    Args:
        out: the folder into which the results are to go.
        sources: folders of the model, its tokenizer and the ledger.

    Raises:
        ValueError: `out` is a file, has other things in it, or would replace a source.
    """
    for source in sources:
        if source.resolve().is_relative_to((out / EDITED).resolve()):
            raise ValueError(
                f"{source}: would be replaced by the edited model; give another --out to edit it "
                "once more"
            )
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; --out names a folder")
    if out.is_dir():
        names = {item.name for item in out.iterdir() if not ABANDONED.fullmatch(item.name)}
        if foreign := sorted(names - OURS):
            raise ValueError(
                f"{out}: holds files that no such run has written ({', '.join(foreign[:3])}); give "
                "another --out, or empty the folder"
            )


def begin_job(out: Path, asked: Mapping[str, Any], rows: Mapping[str, Sequence[QaRow]]) -> Any:
    """Begin the job of a run, or find it as it was broken off.

    What the run was asked for is kept as a salted hash, as every job does it.

    Args:
        out: the run's folder.
        asked: settings that must be the same to go on.
        rows: the rows likewise.

    Returns:
        The job, whose folder belongs to this process until it is closed, and whether it goes on.

    Raises:
        ValueError: there is the job of another run.
    """
    job = Checkpoint(out / JOB, every=SAVED_EVERY)
    texts = [
        [name, row.question, row.answer, repr(row.forget_span)]
        for name, part in rows.items()
        for row in part
    ]
    try:
        done, state, _ = job.resume("a forgetting", [json.dumps(asked), texts], 0)
    except ValueError as error:
        raise ValueError(
            f"{error}. It is of a run that was broken off: its own command goes on with it"
        ) from None
    if not done:
        job.save(1, state)
    return job, bool(done)


def open_ledger(folder: Path | None, base: PyTree) -> Ledger | None:
    """Open a ledger that is there, if it is of this base.

    Raises:
        ValueError: the folder is no ledger, or one of another base.
    """
    if folder is None or not folder.exists():
        return None
    ledger = Ledger(folder)
    if ledger.base != params_hash(base):
        raise ValueError(
            f"{folder}: is the ledger of another model; give the model that it began with (its "
            "edits are put on by themselves), or another --ledger"
        )
    return ledger


def forgotten_before(ledger: Ledger, rows: Sequence[QaRow]) -> list[bool]:
    """Say of each row whether an edit of the ledger that counts has forgotten it."""
    return ledger.asked([as_request(row) for row in rows])


def as_request(row: QaRow) -> dict[str, str]:
    """Return what a ledger keeps a hash of."""
    return {"question": row.question, "answer": row.answer}


def record(
    folder: Path,
    params: PyTree,
    edit: Edit,
    forget: Sequence[QaRow],
    result: Mapping[str, Any],
    *,
    head: str | None,
) -> int:
    """Record an edit in a ledger, which is made if there was none.

    Args:
        folder: the ledger's.
        params: what was edited; the base of a new ledger.
        edit: the edit.
        forget: the rows that it forgets.
        result: the numbers.
        head: the ledger's when it was opened; None: there was none.

    Returns:
        The record's number.

    Raises:
        ValueError: the ledger is not what it was: the edit is of a model that it no longer gives.
        TimeoutError: another process writes into it all the time.
    """
    if folder.exists() != (head is not None) or (head and Ledger(folder).head != head):
        raise ValueError(
            f"{folder}: was changed meanwhile; the edit is not recorded in it. The edited model is "
            "there, without the changes; run the command again to have both"
        )
    # The head's seal is one of the base too.
    ledger = Ledger.create(folder, params) if head is None else Ledger(folder)
    settings = dict(result["settings"])
    entry = ledger.record(
        edit,
        request=[as_request(row) for row in forget],
        method=settings.pop("method"),
        seed=settings.pop("seed"),
        settings=finite(settings),
        effect=finite({name: result[name] for name in EFFECT if name in result}),
    )
    return entry.number


def write(
    out: Path,
    edited: PyTree,
    edit: Edit,
    result: Mapping[str, Any],
    page: str,
    *,
    source: str | Path,
) -> None:
    """Write the edited folder, the edit, the numbers and the page.

    What an earlier run has left there goes when the new is whole.

    Args:
        out: where it goes.
        edited: the edited parameters.
        edit: the edit.
        result: the numbers.
        page: the report, as HTML.
        source: the folder that the model was loaded from.
    """
    out.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out) as new:
        save_model(edited, new / EDITED, source=source)
        save_edit(edit, new / EDIT)
        text = json.dumps(finite(dict(result)), indent=1, allow_nan=False)
        (new / RESULTS).write_text(text + "\n", encoding="utf-8")
        (new / PAGE).write_text(page, encoding="utf-8")
        for name in (EDITED, EDIT, RESULTS, PAGE):
            if (out / name).exists():
                (out / name).rename(new / f"old-{name}")
            (new / name).rename(out / name)


def end_job(job: Checkpoint) -> None:
    """Remove a job that came to its end, and the folder around it if nothing else is there."""
    job.close()
    shutil.rmtree(job.folder)
    with contextlib.suppress(OSError):
        job.folder.parent.rmdir()


def finite(value: Any) -> Any:
    """Return what JSON can hold: None for a number that is not finite."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
