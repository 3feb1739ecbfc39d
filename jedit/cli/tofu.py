"""`jedit tofu`: the TOFU benchmark end to end."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jedit.cli.checks import UsageError
from jedit.cli.options import Tofu
from jedit.cli.rows import factorize_of
from jedit.cli.stages import Stages, check_out, report
from jedit.cli.sweeps import going_on, show

if TYPE_CHECKING:
    from jedit.recipes.tofu.models import Start
    from jedit.recipes.tofu.presets import Preset
    from jedit.recipes.tofu.run import Sets


def tofu_command(options: Tofu, command: str) -> int:
    """Run the benchmark; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    from jedit.data import DataError
    from jedit.methods.catalogue import CATALOGUE
    from jedit.recipes.factorizing import factorize_for
    from jedit.recipes.tofu.presets import KNOWN, PRESETS
    from jedit.recipes.tofu.published import PUBLISHED
    from jedit.recipes.tofu.run import read_sets, tofu

    is_sweep = bool(options.seeds) or options.grid == "published"
    if not is_sweep:
        check_out(options.out)
    preset = PRESETS[options.preset]._replace(protocol=options.protocol)
    if options.forgotten is not None:
        preset = preset._replace(forgotten=options.forgotten)
    if options.grid == "published":
        preset = preset._replace(grid=preset.grid._replace(methods=tuple(PUBLISHED)))
    if options.methods:
        known = tuple(PUBLISHED) if options.grid == "published" else KNOWN
        if unknown := [name for name in options.methods if name not in known]:
            raise UsageError(f"unknown methods: {', '.join(unknown)}; there are {', '.join(known)}")
        preset = preset._replace(grid=preset.grid._replace(methods=options.methods))
    _check_folders(options)
    rows, how = [CATALOGUE[name] for name in preset.grid.methods], factorize_of(options)
    try:
        grid = preset.grid._replace(factorize=factorize_for(rows, how))
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    preset = preset._replace(grid=grid)
    saved: dict[str, Any] = {}
    edited = options.out.with_name(f"{options.out.name}-edited")
    if options.save is not None:
        run = preset.grid.methods
        if options.save not in run:
            raise UsageError(f"--save {options.save}: is not run; these are: {', '.join(run)}")
        if edited.exists():
            raise UsageError(f"{edited}: is there already; remove it, or give another --out")
    try:
        sets = read_sets(options.data, preset)
    except (DataError, ValueError) as error:
        raise UsageError(str(error)) from None
    if is_sweep:
        return _sweep(options, preset, sets)
    stages = Stages()
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

    code = report(comparison, stages, options.out, options.seed, command)
    if options.save is not None and options.model is not None:
        if options.save not in saved:
            raise UsageError(f"--save {options.save}: no point of it is within the rule")
        from jedit.models import cast_params, save_model

        params = cast_params(saved[options.save], preset.dtype)
        print(f"Edited model: {save_model(params, edited, source=options.model)}")
    return code


def _sweep(options: Tofu, preset: "Preset", sets: "Sets") -> int:
    """Make every run that is not made yet, and print the tables; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    from jedit.recipes.sweep import check_out as check_sweep_out
    from jedit.recipes.sweep import folder_hash
    from jedit.recipes.tofu.sweep import Folders, both_models, tofu_sweep

    assert options.model is not None
    seeds = options.seeds or (options.seed,)
    folders = Folders(options.model, options.retrained, options.tokenizer)
    stages = Stages()
    try:
        check_sweep_out(options.out)
        with going_on(options.out), stages:
            begin, folders = both_models(
                folders, sets, preset, options.out, seed=seeds[0], say=stages
            )
            about = {
                name: None if folder is None else folder_hash(folder)
                for name, folder in folders._asdict().items()
            }
            tables = tofu_sweep(
                sets, preset, begin, seeds, options.out, about, points=options.grid, say=stages
            )
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
    show(tables, options.out, stages)
    return 0


def _check_folders(options: Tofu) -> None:
    """Refuse options that do not go with each other, and folders that are not there.

    Raises:
        UsageError: an option or a folder that is to be mended, by its name.
    """
    with_model = ("retrained", "tokenizer", "save")
    is_sweep = bool(options.seeds) or options.grid == "published"
    if is_sweep and options.preset != "checkpoint":
        raise UsageError("--seeds and --grid published go with --preset checkpoint --model DIR.")
    if not is_sweep and options.protocol == "field":
        raise UsageError(
            "--protocol field goes with --seeds or --grid published: the report of one comparison "
            "speaks of retain rows that no edit has seen."
        )
    if is_sweep and options.save is not None:
        raise UsageError("--save goes with one comparison, not with --seeds or --grid published.")
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


def _load(options: Tofu, model: Path, preset: "Preset", stages: Stages) -> "Start":
    from jedit.recipes.tofu.models import Pretrained, from_folders

    assert isinstance(preset.model, Pretrained)
    stages(f"loading {model}" + (f" and {options.retrained}" if options.retrained else ""))
    try:
        return from_folders(model, options.retrained, options.tokenizer, preset.model, preset.dtype)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
