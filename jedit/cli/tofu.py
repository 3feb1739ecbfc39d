"""`jedit tofu`: the TOFU benchmark end to end."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jedit.cli.checks import UsageError
from jedit.cli.options import Tofu
from jedit.cli.stages import Stages, check_out, report

if TYPE_CHECKING:
    from jedit.recipes.tofu.models import Start
    from jedit.recipes.tofu.presets import Preset


def tofu_command(options: Tofu, command: str) -> int:
    """Run the benchmark; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    from jedit.data import DataError
    from jedit.recipes.tofu.presets import PRESETS
    from jedit.recipes.tofu.run import read_sets, tofu

    check_out(options.out)
    preset = PRESETS[options.preset]
    if options.forgotten is not None:
        preset = preset._replace(forgotten=options.forgotten)
    if options.methods:
        known = preset.grid.methods
        if unknown := [name for name in options.methods if name not in known]:
            raise UsageError(f"unknown methods: {', '.join(unknown)}; there are {', '.join(known)}")
        preset = preset._replace(grid=preset.grid._replace(methods=options.methods))
    _check_folders(options)
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


def _check_folders(options: Tofu) -> None:
    """Refuse options that do not go with each other, and folders that are not there.

    Raises:
        UsageError: an option or a folder that is to be mended, by its name.
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


def _load(options: Tofu, model: Path, preset: "Preset", stages: Stages) -> "Start":
    from jedit.recipes.tofu.models import Pretrained, from_folders

    assert isinstance(preset.model, Pretrained)
    stages(f"loading {model}" + (f" and {options.retrained}" if options.retrained else ""))
    try:
        return from_folders(model, options.retrained, options.tokenizer, preset.model, preset.dtype)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from None
