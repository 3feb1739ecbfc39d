"""`jedit run`: forget questions and answers of one's own, in a small GPT or in a model folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jedit.cli.checks import UsageError
from jedit.cli.options import RunFile
from jedit.cli.stages import Stages, check_out, report
from jedit.core.checks import COUNT, COUNT_OR_ZERO, POSITIVE, Range, check_numbers


def run(options: RunFile, command: str) -> int:
    """Forget what the options say; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    from jedit.data import DataError, read_rows, select_rows

    _check_numbers(options)
    _check_used(options)
    if options.model is None:
        check_out(options.out)
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
    stages = Stages()
    if options.model is not None:
        return _edit_checkpoint(options, options.model, forget, retain, stages)

    def comparison() -> Sequence:
        from jedit.recipes.fitting import Recipe
        from jedit.recipes.scenes.authors import GRID
        from jedit.recipes.scenes.question_answer import (
            Caption,
            Model,
            Selection,
            question_answer,
        )

        size = (options.width, options.layers, options.heads, options.vocab, options.max_len)
        epochs = tuple(sorted(set(options.epochs)))
        note = (
            f"A small GPT learns the {len(rows)} rows of {options.data.name} and is then made to "
            f"forget {len(forget)} of them ({options.forget})."
        )
        title = f"Forget {len(forget)} rows of {options.data.name}"
        return question_answer(
            Selection(rows, forget, retain),
            Caption("run", title, note),
            model=Model(*size),
            recipe=Recipe(epochs, options.batch_size, options.learning_rate),
            grid=GRID,
            seed=options.seed,
            say=stages,
        )

    return report(comparison, stages, options.out, options.seed, command)


def _edit_checkpoint(
    options: RunFile, model: Path, forget: Sequence, retain: Sequence, stages: Stages
) -> int:
    from rich.console import Console
    from rich.table import Table

    from jedit.data import read_rows
    from jedit.recipes.by_itself import cautions, how_it_went
    from jedit.recipes.pretrained import Settings, check_folder, forget_in_checkpoint
    from jedit.report.table import number

    settings = Settings(
        method=options.method,
        budget=options.budget,
        temperature=options.temperature,
        steps=options.steps,
        recovery=options.recovery,
        base=options.base,
        rewind=options.rewind,
        rewind_rate=options.rewind_rate,
        attack=options.attack,
        max_len=options.max_len,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    tokenizer = options.tokenizer or model
    sources = [folder for folder in (model, tokenizer, options.base) if folder is not None]
    for folder in sources:
        if not folder.is_dir():
            raise UsageError(f"{folder}: there is no such folder.")
    try:
        check_folder(options.out, *sources)
        unseen = [] if options.unseen is None else read_rows(options.unseen)
        with stages:
            found = forget_in_checkpoint(
                model, tokenizer, forget, retain, options.out, settings, unseen=unseen, say=stages
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
    if "stopped" in found:
        console.print(how_it_went(found), soft_wrap=True, highlight=False)
    console.print(
        f"Retain KL on the rows the edit was priced on: predicted {number(found['predicted_kl'])}, "
        f"true {number(found['true_kl'])}. Edited model: {options.out / 'edited'}",
        soft_wrap=True,
        highlight=False,
    )
    for text in cautions(found, options.budget):
        console.print(text, soft_wrap=True, highlight=False)
    return 0


# What only one of the two ways looks at: training a GPT, and editing a folder's model.
OF_A_REWIND = ("rewind", "rewind_rate")
OF_NATURAL_STEPS = ("unseen", "steps", "recovery", "attack", "base", *OF_A_REWIND)
OF_A_FOLDER = ("method", "budget", "temperature", "tokenizer", *OF_NATURAL_STEPS)
OF_TRAINING = ("width", "layers", "heads", "epochs", "vocab", "learning_rate")


def _check_used(options: RunFile) -> None:
    """Refuse an option that would not be looked at.

    Raises:
        UsageError: the first such option.
    """
    is_folder = options.model is not None
    defaults = {field.name: field.default for field in dataclasses.fields(RunFile)}
    for name in OF_TRAINING if is_folder else OF_A_FOLDER:
        if getattr(options, name) != defaults[name]:
            where = "without --model, where a GPT is trained" if is_folder else "with --model"
            raise UsageError(f"{_option(name)} is only looked at {where}.")
    if options.method != "natural":
        for name in OF_NATURAL_STEPS:
            if getattr(options, name) != defaults[name]:
                raise UsageError(f"{_option(name)} is only looked at with --method natural.")
    if options.base is None:
        for name in OF_A_REWIND:
            if getattr(options, name) != defaults[name]:
                raise UsageError(f"{_option(name)} is only looked at with --base.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_numbers(options: RunFile) -> None:
    numbers = {
        POSITIVE: ("learning_rate", "budget", "temperature", "rewind_rate"),
        COUNT: ("width", "layers", "heads", "batch_size", "epochs", "steps", "rewind"),
        COUNT_OR_ZERO: ("recovery",),
        Range(258, is_whole=True): ("vocab",),  # the bytes and two special tokens
        Range(8, is_whole=True): ("max_len",),
    }
    try:
        for allowed, names in numbers.items():
            for name in names:
                check_numbers(allowed, **{_option(name): getattr(options, name)})
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    if not options.epochs:
        raise UsageError("--epochs must be at least one number.")
    if options.width % options.heads:
        raise UsageError(f"--width {options.width} is not a multiple of --heads {options.heads}.")
