"""Many requests in one compiled call, beside a loop over the same function for one request.

    python -m tests.bench.gpu_run.many_requests --json FILE [--toy]

What `tests/bench/claims/requests.py` measures of the authors' GPT, of two random GPTs: as small as
that one, where a loop is all starting of programs, and one of 30 million parameters. A request is
one row; speed asks for no training.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.models import gpt
from jedit.recipes.scenes.question_answer import SELECT
from tests.bench.claims.requests import rates
from tests.bench.claims.scenes import Scene
from tests.bench.gpu_run.rates import peak_gib
from tests.bench.gpu_run.stages import write_json


class Size(NamedTuple):
    """A GPT and how many requests it is asked."""

    width: int
    layers: int
    vocab: int
    length: int
    count: int


SIZES = {
    "0.4 million": Size(96, 3, 512, 64, 1000),
    "30 million": Size(512, 8, 2048, 128, 1000),
}
TOYS = {"toy": Size(16, 1, 32, 8, 3)}
ROWS = 64  # of retain


def scene(size: Size, seed: int = 0) -> Scene:
    """A random model, and rows of random tokens."""
    model_key, rows_key = jax.random.split(jax.random.key(seed))
    sizes = {"vocab": size.vocab, "width": size.width, "num_layers": size.layers, "num_heads": 4}
    apply, params = gpt(key=model_key, max_len=size.length, **sizes)
    tokens = jax.random.randint(rows_key, (2 * ROWS, size.length + 1), 0, size.vocab)
    forget, retain = (Batch(x[:, :-1], x[:, 1:]) for x in (tokens[:ROWS], tokens[ROWS:]))
    return Scene(apply, params, forget, retain, retain, SELECT)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--toy", action="store_true")
    given = options.parse_args(arguments)
    found: dict = {"target": 20.0, "sizes": {}}
    for name, size in (TOYS if given.toy else SIZES).items():
        made = scene(size)
        estimator = kfac(made.apply, Categorical(), select=SELECT)
        curvature = estimate(estimator, made.params, made.retain, key=jax.random.key(1))
        row = rates(made, curvature, size.count)
        parameters = sum(x.size for x in jax.tree.leaves(made.params))
        row |= {"parameters": parameters, "count": size.count, "peak_gib": peak_gib()}
        row["times a loop"] = row["requests a second"] / row["in a loop"]
        found["sizes"][name] = row
        write_json(given.json, found)


if __name__ == "__main__":
    main()
