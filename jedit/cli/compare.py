"""`jedit compare`: a small GPT learns questions and answers of one's own; methods are compared."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jedit.cli.checks import UsageError
from jedit.cli.options import Compare
from jedit.cli.rows import check_option_numbers, factorize_of, rows_of_file
from jedit.cli.stages import Stages, check_out, report
from jedit.core.checks import COUNT, POSITIVE, Range

if TYPE_CHECKING:
    from jedit.curvature import Factorize
    from jedit.recipes.comparison.task import Grid


def compare(options: Compare, command: str) -> int:
    """Train, forget and compare what the options say; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    check_option_numbers(
        options,
        {
            POSITIVE: ("learning_rate",),
            COUNT: ("width", "layers", "heads", "batch_size", "epochs"),
            Range(258, is_whole=True): ("vocab",),  # the bytes and two special tokens
            Range(8, is_whole=True): ("max_len",),
        },
    )
    if not options.epochs:
        raise UsageError("--epochs must be at least one number.")
    if options.width % options.heads:
        raise UsageError(f"--width {options.width} is not a multiple of --heads {options.heads}.")
    how = factorize_of(options)
    grid = _grid(options, how)
    check_out(options.out)
    rows, forget, retain = rows_of_file(options.data, options.forget, options.retain)
    stages = Stages()

    def comparison() -> Sequence:
        from jedit.recipes.fitting import Recipe
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
            Caption("compare", title, note),
            model=Model(*size),
            recipe=Recipe(epochs, options.batch_size, options.learning_rate),
            grid=grid,
            seed=options.seed,
            say=stages,
        )

    return report(comparison, stages, options.out, options.seed, command)


def _grid(options: Compare, how: "Factorize") -> "Grid":
    """Return what is compared.

    Raises:
        UsageError: a method that is none, that needs what rows of one's own do not give, or that
            takes what factors are not to hold.
    """
    from jedit.recipes.scenes.authors import GRID
    from jedit.recipes.scenes.question_answer import served

    grid = GRID if not options.methods else GRID._replace(methods=options.methods)
    try:
        return served(grid._replace(factorize=how), "jedit compare", has_unseen=False)
    except ValueError as error:
        raise UsageError(f"{error}.") from None
