"""`jedit forget`: a pretrained model's folder forgets rows, by any method that suits it."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jedit.cli.checks import UsageError, shortened
from jedit.cli.mesh import mesh_axes, mesh_of
from jedit.cli.options import Factors
from jedit.cli.rows import check_option_numbers, factorize_of, option, rows_of_file
from jedit.cli.stages import Stages
from jedit.core.checks import COUNT, COUNT_OR_ZERO, POSITIVE, Range

_BLOCKS = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class Forget:
    """Make a pretrained model's folder forget rows (JSON lines: question, answer).

    OUT gets edited (a folder like --model), edit, results.json and index.html. A run that was
    broken off goes on when the same command is given again.
    """

    model: Path
    """Folder of the model (Hugging Face, safetensors)."""
    data: Path
    """The rows that it knows. A row's field forget_span says what of its answer is to be
    forgotten; alternate_answer is what AltPO prefers."""
    forget: str
    """Rows to forget: a file, FIELD=VALUE[,VALUE] (customer=Jane Doe), or rows=START:STOP counted
    from 0."""
    retain: str = "rest"
    """Rows to keep, in the same ways; rest: all that are not forgotten."""
    out: Path = Path("out/forget")
    """Folder of what is made; that of an earlier run there is replaced."""
    method: str = "natural"
    """natural: steps that stop by themselves, the best by our tables; or a method of the catalogue
    by its name (help lists them)."""
    budget: float | None = None
    """Retain KL that the edit may cost, nats per answer token, kept in truth on rows that it does
    not see. None: 0.05 for K-FADE and curvature pruning; others may cost what they take."""
    unseen: Path | None = None
    """Rows of the same kind that the model was not trained on, a file like --data: steps stop where
    the rows to forget cannot be told from them, and a model that never knew these is left alone."""
    tokenizer: Path | None = None
    """Folder of the model's tokenizer; None: the model's."""
    select: str | None = None
    """Regular expression of the parameters to edit, by their paths. None: the matrices of the
    blocks, or all that a method trains."""
    layers: str | None = None
    """Blocks whose matrices are edited: 4-9, or 4,5,6, counted from 0."""
    mesh: str | None = None
    """Devices to split the model and the rows over: data=4,model=2."""
    ledger: Path | None = None
    """Ledger in which the edit is recorded; it is made if it is not there. What its edits forgot is
    left out of --retain."""
    steps: int | None = None
    """Steps at most, of natural ones and of a method that trains; of RULE draws of answers, of OFMU
    rounds of six updates. None: 48."""
    learning_rate: float | None = None
    """Of a method that trains. None: what TOFU's preset for checkpoints tries last: 1e-5, 3e-5 for
    what is bounded, and for some their own unit."""
    factorize: Factors | None = None
    """How factors of curvatures are kept: eigh, with all eigenvectors; cholesky or inverse, with
    none, for methods that take damped solves or matrices alone; auto: by size, with none beyond
    8192 columns where no method takes them. None: auto, or with --rank eigh."""
    rank: int | None = None
    """Leading eigenvectors that are kept of a factor, the rest by their mean; of long ones alone
    with --factorize auto."""
    max_dim: int = 16384
    """Longest axis that gets a dense factor; longer ones a diagonal one."""
    temperature: float | None = None
    """Of the curvature's likelihood. None: it is measured."""
    recovery: int = 48
    """Steps after natural ones that bring back what they cost; 0: none."""
    base: Path | None = None
    """With natural steps: folder of the model before it learned the rows. The edit first goes six
    tenths of the way back to it: it lasts longer, but keeps only what the rows that it sees or that
    model hold (seven tenths of --retain; the others judge)."""
    rewind: int = 100
    """With --base: steps from there, before the natural ones; best two fifths of retraining's."""
    rewind_rate: float = 2e-5
    """With --base: Adam's learning rate in them; best twice what the model was trained by."""
    attack: bool = True
    """Teach some rows again after the edit, to see what comes back."""
    resumable: bool = True
    """Save the job on the way in OUT/job, which takes room on the disk."""
    max_len: int = 256
    """Tokens of a row, at most; longer rows are cut off."""
    batch_size: int = 8
    """Rows of a step, and evaluated at a time."""
    seed: int = 0
    """Of everything random."""


def asks_for_methods(arguments: Sequence[str]) -> bool:
    """Say whether a command line is `jedit forget --method help`, whatever else it has."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    asked = any(x == "--method=help" or (x, y) == ("--method", "help") for x, y in pairs)
    return arguments[:1] == ["forget"] and asked


def list_methods() -> int:
    """Print the methods that suit a language model's folder; return the exit code."""
    from rich.console import Console
    from rich.table import Table

    from jedit.recipes.folders.choice import methods

    table = Table(box=None)
    table.add_column("method", no_wrap=True)
    table.add_column("")
    for name, description in methods():
        table.add_row(name, description)
    console = Console(markup=False)
    (console if console.is_terminal else Console(width=160)).print(table)
    return 0


def forget(options: Forget, command: str) -> int:
    """Forget what the options say; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    del command
    numbers = {
        POSITIVE: ("budget", "temperature", "rewind_rate", "learning_rate"),
        COUNT: ("batch_size", "steps", "rewind"),
        COUNT_OR_ZERO: ("recovery",),
        Range(8, is_whole=True): ("max_len",),
    }
    check_option_numbers(options, numbers)
    how = factorize_of(options)
    blocks = () if options.layers is None else blocks_of(options.layers)
    if options.select is not None and blocks:
        raise UsageError("--select and --layers say the same in two ways; give one of them.")
    if options.mesh is not None:
        mesh_axes(options.mesh)
    _, gone, kept = rows_of_file(options.data, options.forget, options.retain, is_priced=True)
    tokenizer = options.tokenizer or options.model
    folders = [x for x in (options.model, tokenizer, options.base) if x is not None]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: there is no such folder.")

    from jedit.data import read_rows
    from jedit.recipes.folders.choice import check_settings, method_named
    from jedit.recipes.folders.settings import STEPS, Settings
    from jedit.recipes.folders.written import check_folder
    from jedit.recipes.pretrained import forget_in_checkpoint

    stages = Stages()
    try:
        check_settings(method_named(options.method), _given(options))
        check_folder(options.out, *folders)
        _check_ledger(options)
        unseen = [] if options.unseen is None else read_rows(options.unseen)
        same = {field: getattr(options, field) for field in Settings._fields if field in SAME}
        settings = Settings(
            **same,
            steps=STEPS if options.steps is None else options.steps,
            factorize=how,
            layers=blocks,
            mesh=None if options.mesh is None else mesh_of(options.mesh),
            is_resumable=options.resumable,
        )
        with stages:
            found = forget_in_checkpoint(
                options.model,
                tokenizer,
                gone,
                kept,
                options.out,
                settings,
                unseen=unseen,
                say=stages,
            )
    except (ValueError, ImportError, FloatingPointError) as error:
        raise UsageError(str(error)) from None
    except TimeoutError as error:  # another process has the job, or writes the ledger
        raise UsageError(error.strerror or str(error)) from None
    _show(options, found, len(gone))
    return 0


# Options that the settings have by the same name.
SAME = frozenset(
    ("method", "budget", "temperature", "learning_rate", "recovery", "base", "rewind")
    + ("rewind_rate", "attack", "select", "ledger", "max_len", "batch_size", "seed")
)


def blocks_of(text: str) -> tuple[int, ...]:
    """Return the numbers that a text such as "4-9" or "4,5,6" names.

    Raises:
        UsageError: the text is of another form, or a range ends before it begins.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _BLOCKS.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"--layers {shortened(text)}: is not of the form 4-9 or 4,5,6.")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise UsageError(f"--layers {shortened(text)}: {part.strip()} ends before it begins.")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _given(options: Forget) -> list[str]:
    """Return the names of the options that are not at their defaults."""
    fields = dataclasses.fields(Forget)
    return [x.name for x in fields if getattr(options, x.name) != x.default]


def _check_ledger(options: Forget) -> None:
    ledger, out = options.ledger, options.out
    if ledger is not None and ledger.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{ledger}: lies within --out, which is replaced; put it elsewhere.")


def _show(options: Forget, found: dict[str, Any], number_forgotten: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from jedit.recipes.by_itself import cautions, how_it_went
    from jedit.report.table import number

    table = Table(title=f"Forget {number_forgotten} rows", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, before in found["before"].items():
        table.add_row(name.replace("_", " "), number(before), number(found["after"][name]))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    if num_cut := sum(found["num_cut_off"].values()):
        console.print(f"{num_cut} rows are longer than {options.max_len} tokens and were cut off.")
    if sentence := how_it_went(found):
        console.print(sentence)
    console.print(
        f"Retain KL on the rows the edit was priced on: predicted {number(found['predicted_kl'])}, "
        f"true {number(found['true_kl'])}. Edited model: {options.out / 'edited'}"
    )
    for text in cautions(found, options.budget):
        console.print(text)
    if "ledger_entry" in found:
        console.print(f"Recorded in {options.ledger} as entry {found['ledger_entry']}.")
    if number_before := found.get("ledger", {}).get("edits_before"):
        console.print(
            f"The edited model holds earlier edits of the ledger ({number_before}): an audit is "
            "of all of them: name what they forgot in its --forget as well."
        )
    console.print(f"To judge it in full: {audit_command(options)}")


def audit_command(options: Forget) -> str:
    """Return the command that judges the edited folder in full."""
    default = {x.name: x.default for x in dataclasses.fields(Forget)}  # those of the audit too
    told: list[tuple[str, Any]] = [
        ("base", options.model),
        ("edited", options.out / "edited"),
        ("data", options.data),
        ("forget", options.forget),
    ]
    if options.retain != "rest":
        told.append(("retain", options.retain))
    told += [(k, v) for k in ("unseen", "tokenizer") if (v := getattr(options, k)) is not None]
    told += [(k, v) for k in ("max_len", "batch_size") if (v := getattr(options, k)) != default[k]]
    return shlex.join(["jedit", "audit", *(x for k, v in told for x in (option(k), str(v)))])
