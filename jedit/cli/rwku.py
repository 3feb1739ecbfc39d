"""`jedit rwku`: make a model of a folder forget one of RWKU's people, and measure what is left."""

import dataclasses
from pathlib import Path
from typing import Literal

from jedit.cli.checks import UsageError
from jedit.cli.sweeps import SweepOptions, run_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class RwkuOptions(SweepOptions):
    """Run RWKU for one person on a model of your own, by several methods and seeds."""

    data: Path
    """RWKU's folder, with its people's folders in it or in Target/."""
    target: str
    """The person to be forgotten, by name ("Stephen King") or by folder (1_Stephen_King)."""
    retain: Path | None = None
    """File of texts to be kept (.jsonl with "text", or .txt). None: the passages about the other
    people there."""
    corpus: Literal["passages", "questions"] = "passages"
    """What is forgotten: the passages about the person, or the questions of level 2 with their
    answers, which then are among what is asked."""
    out: Path = Path("out/rwku")
    """Folder of the runs and of the tables; a run that stands there is not made again."""


def rwku_command(options: RwkuOptions, command: str) -> int:
    """Run RWKU; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    del command
    from jedit.data import DataError
    from jedit.recipes.editing import Runs
    from jedit.recipes.named import check_methods
    from jedit.recipes.rwku.run import METHODS, needs_met, rwku
    from jedit.recipes.rwku.sets import read_person

    methods = options.methods or METHODS
    try:
        check_methods(methods, needs_met(options.corpus), f"RWKU's {options.corpus}")
        data = read_person(options.data, options.target, options.retain)
    except (DataError, ValueError) as error:
        raise UsageError(str(error)) from None
    return run_folder(
        options,
        options.out,
        lambda start, strength, about, say: rwku(
            start,
            data,
            Runs(methods, strength, options.seeds),
            options.out,
            about,
            corpus=options.corpus,
            say=say,
        ),
    )
