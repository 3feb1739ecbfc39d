"""The command line: `jedit demo`, `run` on one's own rows, `plan`, `tofu`, `ledger`."""

import shlex
import sys
from collections.abc import Callable, Sequence

import jedit
from jedit.cli.checks import UsageError, check_arguments, check_options, disk_sentence
from jedit.cli.options import Demo, RunFile, Tofu


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
    from jedit.cli.demo import demo
    from jedit.cli.ledger import LedgerOptions, ledger
    from jedit.cli.plan import PlanOptions, plan_command
    from jedit.cli.run import run
    from jedit.cli.tofu import tofu_command

    commands: dict[str, tuple[type, Callable]] = {
        "demo": (Demo, demo),
        "run": (RunFile, run),
        "plan": (PlanOptions, plan_command),
        "tofu": (Tofu, tofu_command),
        "ledger": (LedgerOptions, ledger),
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
        command = dict(commands.values())[type(chosen)]
        return command(chosen, shlex.join(["jedit", *arguments]))
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
