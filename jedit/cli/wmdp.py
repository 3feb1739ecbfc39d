"""`jedit wmdp`: WMDP's accuracies of a model of a folder, before and after it forgets."""

import dataclasses
from pathlib import Path

from jedit.cli.checks import UsageError
from jedit.cli.sweeps import SweepOptions, run_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class WmdpOptions(SweepOptions):
    """Run WMDP on a model of your own: forget one corpus, keep another."""

    data: Path
    """WMDP's folder (wmdp-bio/test.json, ...)."""
    forget: Path
    """File of texts to be forgotten (.jsonl with "text", or .txt)."""
    retain: Path
    """File of texts to be kept."""
    subjects: tuple[str, ...] = ("bio", "cyber")
    """Of "bio", "cyber" and "chem", those that are asked about."""
    mmlu: Path | None = None
    """File of questions that are to stay answered, of MMLU's form (question, choices, answer)."""
    out: Path = Path("out/wmdp")
    """Folder of the runs and of the tables; a run that stands there is not made again."""


def wmdp_command(options: WmdpOptions, command: str) -> int:
    """Run WMDP; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    del command
    from jedit.data import DataError
    from jedit.recipes.editing import OF_TEXTS, Runs
    from jedit.recipes.named import check_methods
    from jedit.recipes.wmdp import METHODS, read_sets, wmdp

    methods = options.methods or METHODS
    try:
        check_methods(methods, OF_TEXTS, "WMDP")
        data = read_sets(
            options.data, options.subjects, options.forget, options.retain, options.mmlu
        )
    except (DataError, ValueError) as error:
        raise UsageError(str(error)) from None
    return run_folder(
        options,
        options.out,
        lambda start, strength, about, say: wmdp(
            start, data, Runs(methods, strength, options.seeds), options.out, about, say=say
        ),
    )
