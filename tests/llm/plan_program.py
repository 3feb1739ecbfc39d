"""An edit of a model folder in a process of its own, whose memory is watched from outside.

    python -m tests.llm.plan_program FOLDER METHOD ROWS LENGTH

It says "ready" when everything is imported, waits for a line, edits, and says "done".
"""

import sys

import jax
import numpy as np

from jedit import requests
from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches
from jedit.methods import Ascent, kfade
from jedit.models import load_model
from jedit.recipes.folders.places import SELECT
from jedit.requests import Forgetting, Natural, Recovery


def rows(number, length, vocab, seed):
    tokens = np.random.default_rng(seed).integers(1, vocab, (number, length + 1)).astype(np.int32)
    counts = np.ones((number, length), bool)
    return Batch(tokens[:, :-1], tokens[:, 1:], counts, counts)


def edit(folder, method, number, length):
    """Load, fit and edit, as `jedit run --model` does."""
    apply, params, config = load_model(folder)
    forget, retain = (rows(n, length, config.vocab_size, n) for n in (number // 2, number))
    key = jax.random.key(0)
    if method == "kfade":
        sets = [list(batches(batch, 8)) for batch in (forget, retain)]
        estimator = kfac(apply, Categorical(), select=SELECT)
        curvature = estimate(estimator, params, sets[1], key=key)
        made, _ = kfade(apply, params, curvature, *sets, budget=0.05, damping=0.1, ascent=Ascent(1))
    else:
        how = Natural(select=SELECT, batch_size=8, recovery=Recovery(4, batch_size=8))
        how = Forgetting(how, likelihood=Categorical(), steps=8)
        made, _ = requests.forget(apply, params, forget, retain, key=key, how=how)
    return jax.block_until_ready(made.blocks)


def main(folder, method, number, length):
    jax.block_until_ready(jax.numpy.zeros(1))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    edit(folder, method, int(number), int(length))
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
