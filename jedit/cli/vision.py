"""`jedit vision`: image classifiers forget a random tenth or a class, by the field's protocol."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jedit.cli.checks import UsageError
from jedit.cli.rows import check_option_numbers
from jedit.cli.stages import Stages
from jedit.cli.sweeps import going_on, show
from jedit.core.checks import COUNT, POSITIVE, POSITIVE_SHARE

if TYPE_CHECKING:
    from jedit.recipes.vision.run import Protocol


@dataclasses.dataclass(frozen=True)
class VisionOptions:
    """Make residual networks forget images, and compare with retraining: UA, RA, TA, MIA, RTE."""

    cifar: Path | None = None
    """Folder of CIFAR-10: cifar-10-batches-bin, or cifar-10-batches-py, whose pickles are read and
    not run."""
    mnist: Path | None = None
    """Folder of MNIST's four files, plain or gzipped. Neither folder: scikit-learn's digits."""
    rows: int | None = None
    """Images to train on, the first ones. None: all."""
    tasks: tuple[Literal["random", "class"], ...] = ("random", "class")
    """What is forgotten: a random share of the images, or a class; another one for each seed."""
    fraction: float = 0.1
    """The share that is forgotten at random."""
    methods: tuple[str, ...] = ()
    """Methods by their names in jedit.methods.CATALOGUE. None given: all that suit."""
    points: Literal["grid", "published"] = "grid"
    """grid: each method at four to six strengths on a seed of its own, and the one nearest to
    retrained is reported on the others; published: one point each, the paper's where it is
    known."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each with models and a forget set of its own."""
    epochs: float | None = None
    """Passes over the images of a method that trains, on the grid. None: the images' own preset."""
    batch_size: int | None = None
    """Images to forget, and images to keep, of one step of a method. None: the preset's."""
    train_epochs: int | None = None
    """Passes of the models' own training. None: the preset's (CIFAR-10: 182)."""
    train_batch_size: int | None = None
    """Images of one step of it. None: the preset's (CIFAR-10: 256)."""
    train_rate: float | None = None
    """Its learning rate in the first half. None: the preset's (CIFAR-10: 0.1)."""
    width: int | None = None
    """Channels of the network's first stage. None: the preset's (CIFAR-10: 64)."""
    blocks: tuple[int, ...] = ()
    """Blocks of each stage. None given: the preset's (CIFAR-10: 2 2 2 2, a ResNet-18)."""
    out: Path = Path("out/vision")
    """Folder of the models, the runs and the tables; a run that stands there is not made again."""


def vision_command(options: VisionOptions, command: str) -> int:
    """Run the protocol; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    del command
    folder = _check(options)
    from jedit.recipes.vision.points import METHODS
    from jedit.recipes.vision.presets import PRESETS, load_images
    from jedit.recipes.vision.run import Runs, check_runs, vision

    source = "cifar10" if options.cifar else "mnist" if options.mnist else "digits"
    runs = Runs(options.methods or METHODS, options.points, options.seeds, options.tasks)
    try:
        check_runs(runs, options.out)
        images = load_images(source, folder, options.rows)
        stages = Stages()
        with going_on(options.out), stages:
            protocol = _changed(PRESETS[source], options)
            outcomes = vision(images, protocol, runs, options.out, say=stages)
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None
    except FloatingPointError as error:
        raise UsageError(f"{error}; give a smaller --train-rate.") from None
    for what, _, tables in outcomes:
        titled = [(f"{what}: {title}", lines) for title, lines in tables]
        show(titled, options.out / what, stages)
    return 0


def _check(options: VisionOptions) -> Path | None:
    """Return the images' folder.

    Raises:
        UsageError: an option that is refused, by its name.
    """
    if options.cifar and options.mnist:
        raise UsageError("give --cifar or --mnist, one of the two.")
    folder = options.cifar or options.mnist
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder.")
    for name in ("seeds", "tasks"):
        if not getattr(options, name):
            raise UsageError(f"--{name} must be at least one.")
    counts = ("rows", "batch_size", "train_epochs", "train_batch_size", "width", "blocks")
    check_option_numbers(
        options,
        {COUNT: counts, POSITIVE: ("epochs", "train_rate"), POSITIVE_SHARE: ("fraction",)},
    )
    return folder


def _changed(preset: "Protocol", options: VisionOptions) -> "Protocol":
    """Return the preset with what the options say otherwise."""
    given = {
        preset.model: {"width": options.width, "blocks": options.blocks or None},
        preset.recipe: {
            "epochs": options.train_epochs,
            "batch_size": options.train_batch_size,
            "learning_rate": options.train_rate,
        },
    }
    model, recipe = (
        part._replace(**{name: value for name, value in changes.items() if value is not None})
        for part, changes in given.items()
    )
    own = {"epochs": options.epochs, "batch_size": options.batch_size}
    own = {name: value for name, value in own.items() if value is not None}
    return preset._replace(model=model, recipe=recipe, fraction=options.fraction, **own)
