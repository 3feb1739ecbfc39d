"""`jedit forget` on eight devices: the command line that it is given, and nothing else."""

import sys

import jax

from jedit.cli.main import main

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", sys.argv[1] == "x64")
    sys.exit(main(sys.argv[2:]))
