"""Write a report as a folder, all of it or nothing."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from jedit.report.evaluation_log import write_evaluation_log
from jedit.report.figure import save_png, tradeoff_figure
from jedit.report.page import page
from jedit.report.results import Run, to_json

PAGE, RESULTS, EVALUATIONS = "index.html", "results.json", "evaluations"
FIGURES = re.compile(r"(tradeoff|stream)-.*\.png")


def check_destination(out: Path, names: Collection[str] | None = None) -> None:
    """Refuse a destination that a report may not replace; call it before the work, not after.

    Args:
        out: the folder of the report.
        names: names of the files that a report of this kind consists of; None: a comparison's.

    Raises:
        ValueError: the destination is a file, a link to nothing, or a folder with something in it
            that is no report.
    """
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out}: is a link to {os.readlink(out)}, which is not there")
    if not out.exists():
        for parent in out.absolute().parents:
            if parent.exists():
                if not parent.is_dir() or not os.access(parent, os.W_OK):
                    raise ValueError(f"{out}: cannot be made, {parent} is no writable folder")
                return
    if not out.is_dir():
        raise ValueError(f"{out}: is a file; --out names a folder")
    is_ours = _is_ours if names is None else names.__contains__
    foreign = [item.name for item in out.iterdir() if not is_ours(item.name)]
    if foreign:
        raise ValueError(
            f"{out}: holds files that are no report ({', '.join(sorted(foreign)[:3])}); give "
            "another --out, or empty the folder"
        )


def write_report(run: Run, out: Path) -> Path:
    """Write results.json, a PNG for each figure and index.html, and return the page's path.

    Evaluations, where there are any, go to evaluations/MODEL in open-unlearning's schema.

    All is written to a new folder beside `out`, which then takes its place: whoever looks sees the
    old report or the new one. An earlier report there is replaced.

    Raises:
        ValueError: a destination that `check_destination` refuses.
    """
    check_destination(out)

    def write(new: Path) -> None:
        text = json.dumps(to_json(run), indent=1, allow_nan=False, ensure_ascii=False)
        (new / RESULTS).write_text(text + "\n", encoding="utf-8")
        for comparison in run.comparisons:
            save_png(tradeoff_figure(comparison), new / f"tradeoff-{comparison.name}.png")
            for model, evaluations in comparison.evaluations.items():
                name = re.sub(r"\W+", "-", model).strip("-").lower()
                write_evaluation_log(evaluations, new / EVALUATIONS / name)
        (new / PAGE).write_text(page(run), encoding="utf-8")

    replace_folder(out, write)
    return out / PAGE


def replace_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Write a folder aside, and put it in the place of the one that may be there.

    Args:
        out: the folder; what is there goes, as soon as the new one is whole.
        write: a function that writes the files into the folder that it is given.
    """
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        new.chmod(0o755)
        write(new)
        _replace(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=new.parent))
    try:
        # A folder can be renamed onto an empty one, but not onto a full one.
        out.rename(old)
        new.rename(out)
    finally:
        if not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _is_ours(name: str) -> bool:
    return name in (PAGE, RESULTS, EVALUATIONS) or FIGURES.fullmatch(name) is not None
