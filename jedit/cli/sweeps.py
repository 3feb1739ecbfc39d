"""What the benchmarks on a model's folder share: their options, the loading, and the tables."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jedit.cli.checks import UsageError
from jedit.cli.stages import Stages

if TYPE_CHECKING:
    from jedit.recipes.editing import Strength
    from jedit.recipes.tofu.models import Start

Tables = list[tuple[str, list[list[str]]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options that benchmarks on a model's folder have in common."""

    model: Path
    """Folder of a pretrained model (Hugging Face, safetensors)."""
    tokenizer: Path | None = None
    """Folder of the model's tokenizer; None: the model's."""
    methods: tuple[str, ...] = ()
    """Methods by their names in jedit.methods.CATALOGUE. None given: the benchmark's own choice."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the curvature's labels and of the batches; with several, intervals are over them."""
    steps: int = 100
    """Steps of the methods that train."""
    batch_size: int = 8
    """Rows to forget, and rows to keep, of one step; and rows evaluated at a time."""
    learning_rate: float = 1e-5
    """Adam's, of the methods that train by it."""
    predicted_kl: float = 1e-4
    """Retain KL that one natural step is predicted to cost, nats per token."""
    step_length: float = 0.1
    """Length of one step of RepSelect."""
    scale: float = 1.0
    """What an edit in closed form is multiplied by."""
    budget: float = 0.05
    """True retain KL that K-FADE may cost, nats per token."""
    max_len: int = 512
    """Tokens of a row, at most; a longer text makes several rows."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """In which the model is computed; weights are kept in float32."""


def run_folder(
    options: SweepOptions,
    out: Path,
    run: Callable[["Start", "Strength", dict[str, Any], Stages], Tables],
    *,
    retrained: Path | None = None,
) -> int:
    """Check the options, load the model, make the runs, print the tables; return the exit code.

    Args:
        options: the options.
        out: folder of the records and of the tables.
        run: makes the runs: of the model, the strength of the edits, what records say of the
            model, and the watcher.
        retrained: folder of the same model that never learned what is forgotten, if there is one.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    from jedit.recipes.editing import Strength
    from jedit.recipes.sweep import check_out, folder_hash
    from jedit.recipes.tofu.models import Pretrained, from_folders

    check_sweep(options)
    if retrained is not None and not retrained.is_dir():
        raise UsageError(f"{retrained}: there is no such folder.")
    stages = Stages()
    try:
        check_out(out)
        with going_on(out), stages:
            stages(f"loading {options.model}")
            settings = Pretrained(options.max_len, options.batch_size)
            start = from_folders(
                options.model, retrained, options.tokenizer, settings, options.dtype
            )
            folders = {"tokenizer": options.tokenizer, "retrained": retrained}
            about = {
                "model": folder_hash(options.model),
                **{k: None if x is None else folder_hash(x) for k, x in folders.items()},
                "max_len": options.max_len,
                "dtype": options.dtype,
            }
            values = {name: getattr(options, name) for name in Strength._fields}
            tables = run(start, Strength(**values), about, stages)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    show(tables, out, stages)
    return 0


@contextlib.contextmanager
def going_on(out: Path) -> Iterator[None]:
    """Say of a sweep that is stopped where its runs stand.

    Raises:
        KeyboardInterrupt: the same, with that sentence.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; whole runs stand in {out / 'runs'}, and the same command goes on from there"
        ) from None


def check_sweep(options: SweepOptions) -> None:
    """Refuse folders that are not there, and numbers out of their range.

    Raises:
        UsageError: the option, by its name.
    """
    from jedit.core.checks import COUNT, POSITIVE, Range, check_numbers

    for folder in (options.model, options.tokenizer):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{folder}: there is no such folder.")
    if not options.seeds:
        raise UsageError("--seeds must be at least one number.")
    numbers = {
        COUNT: ("steps", "batch_size"),
        POSITIVE: ("learning_rate", "predicted_kl", "step_length", "scale", "budget"),
        Range(8, is_whole=True): ("max_len",),
    }
    try:
        for allowed, names in numbers.items():
            for name in names:
                option = f"--{name.replace('_', '-')}"
                check_numbers(allowed, **{option: getattr(options, name)})
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def show(tables: Tables, out: Path, stages: Stages) -> None:
    """Print the tables, and where they stand."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    for title, (heading, *lines) in tables:
        table = Table(title=title, title_justify="left", header_style="bold")
        for i, name in enumerate(heading):
            table.add_column(name, justify="left" if i < 2 else "right", max_width=30)
        for cells in lines:
            table.add_row(*cells)
        console.print(table)
    console.print(
        f"{stages.seconds:.0f} s. Tables: {out / 'table.md'} (numbers: {out / 'results.json'}, "
        f"each run: {out / 'runs'})",
        soft_wrap=True,
        highlight=False,
    )
