"""The command line: `jedit demo`, `run` on one's own rows, `tofu`, `bench`, `ledger`."""

import dataclasses
import resource
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jedit
from jedit.checks import COUNT, POSITIVE, Range, check_numbers
from jedit.recipes.command_line import UsageError, check_arguments, check_options, disk_sentence

if TYPE_CHECKING:
    from jedit.recipes.gpu_bench import BenchOptions
    from jedit.recipes.ledger import LedgerOptions
    from jedit.recipes.tofu_models import Start
    from jedit.recipes.tofu_presets import Preset

DEMO_OUT, RUN_OUT, TOFU_OUT = Path("out/demo"), Path("out/run"), Path("out/tofu")


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train, forget, compare and report on two scenes that need nothing from outside."""

    scene: Literal["digits", "authors", "all"] = "all"
    """Which scene: handwritten digits and a CNN, invented authors and a GPT, or both."""
    methods: Literal["main", "all"] = "main"
    """The main methods, in minutes, or all that fit the scene."""
    out: Path = DEMO_OUT
    """Folder of the report; an earlier report there is replaced."""
    seed: int = 0
    """Of everything random."""


@dataclasses.dataclass(frozen=True)
class RunFile:
    """Do the same on your own questions and answers (JSON lines: question, answer)."""

    data: Path
    """All rows that the model learns. Optional fields: paraphrased_answer, perturbed_answer (a list
    of wrong answers), paraphrased_question, author."""
    forget: str
    """Rows to forget: a file, author=NAME[,NAME], or rows=START:STOP counted from 0."""
    retain: str = "rest"
    """Rows to keep, in the same ways; rest: all that are not forgotten."""
    out: Path = RUN_OUT
    """Folder of the report; an earlier report there is replaced."""
    model: Path | None = None
    """Folder of a pretrained model (Hugging Face, safetensors): it is edited as it is, nothing is
    trained, and the edited folder is written to OUT/edited. None: a small GPT learns the rows."""
    tokenizer: Path | None = None
    """Folder of the model's tokenizer; None: the model's."""
    budget: float = 0.05
    """With --model: retain KL that the edit may cost, nats per answer token."""
    temperature: float = 1.0
    """With --model: of the curvature's likelihood; 4 where the rows are known by heart."""
    width: int = 128
    """Width of the GPT."""
    layers: int = 4
    """Blocks of the GPT."""
    heads: int = 4
    """Heads of its attention; they divide the width."""
    epochs: tuple[int, ...] = (20,)
    """Passes over the rows; with several numbers the comparison is made after each."""
    vocab: int = 2048
    """Tokens of the vocabulary, at most."""
    max_len: int = 128
    """Tokens of a row, at most; longer rows are cut off."""
    batch_size: int = 16
    """Rows of a training step."""
    learning_rate: float = 1e-3
    """Of Adam, in training."""
    seed: int = 0
    """Of everything random."""


@dataclasses.dataclass(frozen=True)
class Tofu:
    """Run the TOFU benchmark end to end; also `jedit run tofu`."""

    data: str = "locuslab/TOFU"
    """TOFU's folder (full.json, forget10_perturbed.json, ...), or its name on the hub."""
    preset: Literal["cpu", "gpu", "checkpoint"] = "cpu"
    """cpu: 60 authors and a GPT of 2 million parameters; gpu: all 200 and 100 million; checkpoint:
    all 200 and a model of your own."""
    model: Path | None = None
    """With --preset checkpoint: folder of a pretrained model (Hugging Face, safetensors). With
    --retrained it has learned all of TOFU's authors; else it learns them here, and a second time
    without those to forget."""
    retrained: Path | None = None
    """Folder of the same model trained without the authors to forget (TOFU's retain90 for 20 of
    them, retain95 for 10, retain99 for 2)."""
    tokenizer: Path | None = None
    """Folder of the model's tokenizer; None: the model's."""
    save: str | None = None
    """With --model: a method whose best model is written to OUT-edited, a folder like --model."""
    forgotten: int | None = None
    """Authors to forget, at most 20; None: the preset's."""
    methods: tuple[str, ...] = ()
    """Some of the methods alone, by name; K-FADE always runs. None given: all."""
    attacks: bool = True
    """Attack the best models: relearning, quantisation, other words, probes."""
    out: Path = TOFU_OUT
    """Folder of the report; an earlier report there is replaced."""
    seed: int = 0
    """Of everything random."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"jedit {jedit.__version__}")
        return 0
    try:
        import rich
        import tyro
    except ImportError as error:
        return _fail(f"the command line needs {error.name}: pip install 'jedit[demo]'")
    del rich
    from jedit.recipes.gpu_bench import BenchOptions
    from jedit.recipes.ledger import LedgerOptions

    commands: dict[str, tuple[type, Callable]] = {
        "demo": (Demo, _demo),
        "run": (RunFile, _run),
        "tofu": (Tofu, _tofu),
        "bench": (BenchOptions, _bench),
        "ledger": (LedgerOptions, _ledger),
    }
    try:
        check_arguments(arguments)
        chosen = tyro.extras.subcommand_cli_from_dict(
            {name: _as_is(options) for name, (options, _) in commands.items()},
            prog="jedit",
            description="Erase and rewrite what a trained network knows, and show what it cost. "
            "(jedit --version prints the version.)",
            args=arguments[1:] if arguments[:2] == ["run", "tofu"] else arguments,
        )
        check_options(chosen)
        run = dict(commands.values())[type(chosen)]
        return run(chosen, shlex.join(["jedit", *arguments]))
    except UsageError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(disk_sentence(error))
    except KeyboardInterrupt:
        return _fail("stopped; nothing was written", code=130)


def _as_is(options: type) -> Callable:
    return options


def _fail(sentence: str, code: int = 2) -> int:
    print(f"jedit: {sentence}", file=sys.stderr)
    return code


def _demo(options: Demo, command: str) -> int:
    _check_out(options.out)
    stages = _Stages()

    def scenes() -> list:
        found = []
        if options.scene in ("digits", "all"):
            from jedit.recipes.digits import ALL, GRID, digits

            grid = ALL if options.methods == "all" else GRID
            found += digits(seed=options.seed, say=stages, grid=grid)
        if options.scene in ("authors", "all"):
            from jedit.recipes.authors import ALL, GRID, authors

            grid = ALL if options.methods == "all" else GRID
            found += authors(seed=options.seed, say=stages, grid=grid)
        return found

    return _report(scenes, stages, options.out, options.seed, command)


def _run(options: RunFile, command: str) -> int:
    from jedit.data import DataError, read_rows, select_rows

    _check_numbers(options)
    if options.model is None:
        _check_out(options.out)
    try:
        rows = read_rows(options.data)
        forget, retain = select_rows(rows, options.forget, options.retain)
    except DataError as error:
        raise UsageError(str(error)) from None
    if len(retain) < 2:
        raise UsageError(
            f"{options.data}: {len(retain)} row to retain; at least 2 are needed, one for the "
            "edits to see and one to judge them."
        )
    stages = _Stages()
    if options.model is not None:
        return _edit_checkpoint(options, options.model, forget, retain, stages)

    def comparison() -> Sequence:
        from jedit.recipes.authors import GRID
        from jedit.recipes.question_answer import Model, question_answer
        from jedit.recipes.training import Recipe

        size = (options.width, options.layers, options.heads, options.vocab, options.max_len)
        epochs = tuple(sorted(set(options.epochs)))
        note = (
            f"A small GPT learns the {len(rows)} rows of {options.data.name} and is then made to "
            f"forget {len(forget)} of them ({options.forget})."
        )
        return question_answer(
            rows,
            forget,
            retain,
            name="run",
            title=f"Forget {len(forget)} rows of {options.data.name}",
            note=note,
            model=Model(*size),
            recipe=Recipe(epochs, options.batch_size, options.learning_rate),
            grid=GRID,
            seed=options.seed,
            say=stages,
        )

    return _report(comparison, stages, options.out, options.seed, command)


def _edit_checkpoint(
    options: RunFile, model: Path, forget: Sequence, retain: Sequence, stages: "_Stages"
) -> int:
    from rich.console import Console
    from rich.table import Table

    from jedit.recipes.checkpoint import Settings, check_folder, forget_in_checkpoint
    from jedit.report.table import number

    settings = Settings(
        budget=options.budget,
        temperature=options.temperature,
        max_len=options.max_len,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    tokenizer = options.tokenizer or model
    for folder in (model, tokenizer):
        if not folder.is_dir():
            raise UsageError(f"{folder}: there is no such folder.")
    try:
        check_folder(options.out, model, tokenizer)
        with stages:
            found = forget_in_checkpoint(
                model, tokenizer, forget, retain, options.out, settings, say=stages
            )
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    table = Table(title=f"Forget {len(forget)} rows", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, before in found["before"].items():
        table.add_row(name.replace("_", " "), number(before), number(found["after"][name]))
    console = Console()
    console.print(table)
    if num_cut := sum(found["num_cut_off"].values()):
        console.print(f"{num_cut} rows are longer than {options.max_len} tokens and were cut off.")
    console.print(
        f"Retain KL on the rows the edit saw: predicted {number(found['predicted_kl'])}, true "
        f"{number(found['true_kl'])}. Edited model: {options.out / 'edited'}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _tofu(options: Tofu, command: str) -> int:
    from jedit.data import DataError
    from jedit.recipes.tofu import read_sets, tofu
    from jedit.recipes.tofu_presets import PRESETS

    _check_out(options.out)
    preset = PRESETS[options.preset]
    if options.forgotten is not None:
        preset = preset._replace(forgotten=options.forgotten)
    if options.methods:
        known = (*preset.grid.scales, *preset.grid.learning_rates)
        if unknown := [name for name in options.methods if name not in known]:
            raise UsageError(f"unknown methods: {', '.join(unknown)}; there are {', '.join(known)}")
        chosen = {
            kind: {k: v for k, v in getattr(preset.grid, kind).items() if k in options.methods}
            for kind in ("scales", "learning_rates")
        }
        preset = preset._replace(grid=preset.grid._replace(**chosen))
    _check_folders(options)
    saved: dict[str, Any] = {}
    edited = options.out.with_name(f"{options.out.name}-edited")
    if options.save is not None:
        run = ("K-FADE (K-FAC)", "K-FADE (EK-FAC)", *preset.grid.scales)
        run += tuple(preset.grid.learning_rates)
        if options.save not in run:
            raise UsageError(f"--save {options.save}: is not run; these are: {', '.join(run)}")
        if edited.exists():
            raise UsageError(f"{edited}: is there already; remove it, or give another --out")
    try:
        sets = read_sets(options.data, preset)
    except (DataError, ValueError) as error:
        raise UsageError(str(error)) from None
    stages = _Stages()
    begin = None
    if options.model is not None:
        begin = _load(options, options.model, preset, stages)

    def keep(name: str, params: Any) -> None:
        if name == options.save:
            saved[name] = params

    def comparison() -> Sequence:
        return tofu(
            sets,
            preset,
            seed=options.seed,
            say=stages,
            with_attacks=options.attacks,
            begin=begin,
            found_model=keep,
        )

    code = _report(comparison, stages, options.out, options.seed, command)
    if options.save is not None and options.model is not None:
        if options.save not in saved:
            raise UsageError(f"--save {options.save}: no point of it is within the rule")
        from jedit.models import cast_params, save_model

        params = cast_params(saved[options.save], preset.dtype)
        print(f"Edited model: {save_model(params, edited, source=options.model)}")
    return code


def _bench(options: "BenchOptions", command: str) -> int:
    from jedit.recipes.gpu_bench import run_bench, sets_of, show

    try:
        sets = sets_of(options)
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(str(error)) from None
    with _Stages() as stages:
        found = run_bench(options, sets, command=command, say=stages)
    show(found, options.out)
    return 0


def _ledger(options: "LedgerOptions", command: str) -> int:
    from jedit.recipes.ledger import run_ledger

    del command
    try:
        return run_ledger(options)
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(str(error)) from None


def _check_folders(options: Tofu) -> None:
    """Refuse options that do not go with each other, and folders that are not there.

    Raises:
        UsageError: what is to be mended.
    """
    with_model = ("retrained", "tokenizer", "save")
    if options.model is None:
        if options.preset == "checkpoint":
            raise UsageError("--preset checkpoint needs --model: the folder of a pretrained model.")
        if given := [name for name in with_model if getattr(options, name) is not None]:
            raise UsageError(f"--{given[0]} goes with --preset checkpoint --model DIR.")
        return
    if options.preset != "checkpoint":
        raise UsageError(
            f"--model goes with --preset checkpoint; the preset {options.preset} makes a model of "
            "its own."
        )
    for folder in (options.model, options.retrained, options.tokenizer):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{folder}: there is no such folder.")
        # The report takes the place of what is there.
        if folder is not None and folder.resolve().is_relative_to(options.out.resolve()):
            raise UsageError(f"{folder}: lies within --out, which is replaced; give another --out")


def _load(options: Tofu, model: Path, preset: "Preset", stages: "_Stages") -> "Start":
    from jedit.recipes.tofu_models import Pretrained, from_folders

    assert isinstance(preset.model, Pretrained)
    stages(f"loading {model}" + (f" and {options.retrained}" if options.retrained else ""))
    try:
        return from_folders(model, options.retrained, options.tokenizer, preset.model, preset.dtype)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None


def _check_numbers(options: RunFile) -> None:
    numbers = {
        POSITIVE: ("learning_rate", "budget", "temperature"),
        COUNT: ("width", "layers", "heads", "batch_size", "epochs"),
        Range(258, is_whole=True): ("vocab",),  # the bytes and two special tokens
        Range(8, is_whole=True): ("max_len",),
    }
    try:
        for allowed, names in numbers.items():
            for name in names:
                check_numbers(allowed, **{f"--{name.replace('_', '-')}": getattr(options, name)})
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    if not options.epochs:
        raise UsageError("--epochs must be at least one number.")
    if options.width % options.heads:
        raise UsageError(f"--width {options.width} is not a multiple of --heads {options.heads}.")


def _check_out(out: Path) -> None:
    from jedit.report import check_destination

    try:
        check_destination(out)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _report(
    make: Callable[[], Sequence], stages: "_Stages", out: Path, seed: int, command: str
) -> int:
    """Make the comparisons, print their tables, write the report."""
    from rich.console import Console

    from jedit.recipes.provenance import machine, versions
    from jedit.report import Run, comparison_table, leaderboard_table, write_report

    date = datetime.now().astimezone().isoformat(timespec="seconds")
    with stages:
        comparisons = tuple(make())
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    for comparison in comparisons:
        console.print()
        console.print(comparison_table(comparison))
        if comparison.leaderboard:
            console.print(leaderboard_table(comparison))
    run = Run(
        command=command,
        date=date,
        seed=seed,
        seconds=stages.seconds,
        peak_memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        versions=versions(),
        machine=machine(),
        comparisons=comparisons,
    )
    page = write_report(run, out)
    console.print(
        f"\n{stages.seconds:.0f} s, peak memory {run.peak_memory_gib:.1f} GiB. Report: {page} "
        f"(numbers: {out / 'results.json'})",
        soft_wrap=True,
        highlight=False,
    )
    return 0


class _Stages:
    """Says on stderr what is being done: a line for each stage, and on a terminal what runs now."""

    def __init__(self):
        from rich.console import Console

        self.console = Console(stderr=True)
        self.start = time.perf_counter()
        self.status = self.console.status("starting")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def __enter__(self) -> "_Stages":
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def __call__(self, text: str) -> None:
        self.console.print(f"{self.seconds:5.0f} s  {text}", highlight=False, soft_wrap=True)
        self.status.update(text)
