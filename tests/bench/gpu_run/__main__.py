"""`python -m tests.bench.gpu_run`: the real thing on an accelerator, timed."""

import shlex
import sys

import tyro

from jedit.cli.checks import UsageError, check_options
from jedit.cli.stages import Stages
from tests.bench.gpu_run.gpu_bench import BenchOptions, run_bench, sets_of, show

COMMAND = "python -m tests.bench.gpu_run"


def main(arguments: list[str] | None = None) -> int:
    """Run it; return the exit code, 2 where the options cannot be followed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(BenchOptions, prog=COMMAND, args=arguments)
    try:
        check_options(options)
        sets = sets_of(options)
    except (UsageError, ValueError, ImportError, OSError) as error:
        sys.stderr.write(f"{COMMAND}: {error}\n")
        return 2
    with Stages() as stages:
        found = run_bench(options, sets, command=f"{COMMAND} {shlex.join(arguments)}", say=stages)
    show(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
