"""`jedit muse`: MUSE's four numbers of a model of a folder, before and after it forgets."""

import dataclasses
from pathlib import Path

from jedit.cli.checks import UsageError
from jedit.cli.sweeps import SweepOptions, run_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuseOptions(SweepOptions):
    """Run MUSE on a model that was trained on MUSE-News or MUSE-Books."""

    data: Path
    """Folder of MUSE-News or MUSE-Books (raw, verbmem, knowmem, privleak)."""
    retrained: Path | None = None
    """Folder of the same model trained without the forget texts, which PrivLeak needs."""
    out: Path = Path("out/muse")
    """Folder of the runs and of the tables; a run that stands there is not made again."""


def muse_command(options: MuseOptions, command: str) -> int:
    """Run MUSE; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    del command
    from jedit.data import DataError
    from jedit.recipes.editing import OF_TEXTS, Runs
    from jedit.recipes.muse import METHODS, muse, read_muse
    from jedit.recipes.named import check_methods

    methods = options.methods or METHODS
    try:
        check_methods(methods, OF_TEXTS, "MUSE")
        data = read_muse(options.data)
    except (DataError, ValueError) as error:
        raise UsageError(str(error)) from None
    return run_folder(
        options,
        options.out,
        lambda start, strength, about, say: muse(
            start, data, Runs(methods, strength, options.seeds), options.out, about, say=say
        ),
        retrained=options.retrained,
    )
