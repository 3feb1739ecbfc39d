"""Random programs against the oracle, by seed: `python -m tests.tracing.fuzz 0:1000`.

Every seed is a program of its own, the same on every machine. A program that fails is printed with
its seed and its error, and the run goes on; it exits with 1 if any did.
"""

import random
import sys
import traceback

import jax
import tqdm

from tests import conftest  # noqa: F401 - strict JAX in float64, and the folder of compiled programs
from tests.tracing.oracle import check_capture
from tests.tracing.programs import INPUTS, make_program

CLEAR_EVERY = 200  # programs, after which what is compiled is dropped from memory


def seeds_of(text: str) -> range:
    """The seeds of "a:b", a <= seed < b, or of one number."""
    first, _, last = text.partition(":")
    return range(int(first), int(last) if last else int(first) + 1)


def check(seed: int) -> str | None:
    """Check the program of one seed; returns what is wrong with it."""
    apply, params, uncovered = make_program(random.Random(seed).choice)
    try:
        check_capture(apply, params, INPUTS, uncovered=uncovered)
    except Exception:  # whatever it is, it is what is looked for
        return traceback.format_exc()
    return None


def main(text: str) -> int:
    """Check the programs of all seeds; returns how many are wrong."""
    failures = {}
    for n, seed in enumerate(tqdm.tqdm(seeds_of(text), mininterval=10)):
        if error := check(seed):
            failures[seed] = error
            tqdm.tqdm.write(f"seed {seed}:\n{error}")
        if n % CLEAR_EVERY == CLEAR_EVERY - 1:
            jax.clear_caches()
    count = len(seeds_of(text))
    tqdm.tqdm.write(f"{count} programs, seeds {text}: {len(failures)} wrong {sorted(failures)}")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
