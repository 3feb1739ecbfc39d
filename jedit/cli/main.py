"""The command line: one command a file; `jedit --help` lists them."""

import shlex
import sys
from collections.abc import Callable, Sequence

import jedit
from jedit.cli.checks import UsageError, check_arguments, check_options, disk_sentence
from jedit.cli.options import Compare, Demo, Tofu

GONE = (
    "there is no `jedit run` any more: `jedit forget --model DIR` makes a model's folder forget "
    "rows, `jedit compare` trains a small GPT on rows and compares methods, and the benchmark is "
    "`jedit tofu`."
)


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
    from jedit.cli.audit import AuditOptions, audit_command
    from jedit.cli.compare import compare
    from jedit.cli.demo import demo
    from jedit.cli.forget import Forget, asks_for_methods, forget, list_methods
    from jedit.cli.ledger import LedgerOptions, ledger
    from jedit.cli.muse import MuseOptions, muse_command
    from jedit.cli.plan import PlanOptions, plan_command
    from jedit.cli.rwku import RwkuOptions, rwku_command
    from jedit.cli.tofu import tofu_command
    from jedit.cli.vision import VisionOptions, vision_command
    from jedit.cli.wmdp import WmdpOptions, wmdp_command

    commands: dict[str, tuple[type, Callable]] = {
        "forget": (Forget, forget),
        "compare": (Compare, compare),
        "demo": (Demo, demo),
        "plan": (PlanOptions, plan_command),
        "tofu": (Tofu, tofu_command),
        "audit": (AuditOptions, audit_command),
        "rwku": (RwkuOptions, rwku_command),
        "muse": (MuseOptions, muse_command),
        "vision": (VisionOptions, vision_command),
        "wmdp": (WmdpOptions, wmdp_command),
        "ledger": (LedgerOptions, ledger),
    }
    try:
        check_arguments(arguments)
        if arguments[:1] == ["run"]:
            return _fail(GONE)
        if asks_for_methods(arguments):
            return list_methods()
        chosen = tyro.extras.subcommand_cli_from_dict(
            {name: _as_is(options) for name, (options, _) in commands.items()},
            prog="jedit",
            description="Erase and rewrite what a trained network knows, and show what it cost. "
            "(jedit --version prints the version.)",
            args=arguments,
        )
        check_options(chosen)
        command = dict(commands.values())[type(chosen)]
        return command(chosen, shlex.join(["jedit", *arguments]))
    except UsageError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(disk_sentence(error))
    except KeyboardInterrupt as error:
        is_job = arguments[:1] == ["forget"] and "--no-resumable" not in arguments
        goes_on = "the same command goes on from its last save, if there is one"
        what = goes_on if is_job else "nothing was written"
        return _fail(str(error) or f"stopped; {what}", code=130)


def _as_is(options: type) -> Callable:
    return options


def _fail(sentence: str, code: int = 2) -> int:
    print(f"jedit: {sentence}", file=sys.stderr)
    return code
