"""An edit of a model folder in a process of its own, whose memory is watched from outside.

    python -m tests.llm.plan_program FOLDER METHOD ROWS LENGTH

It says "ready" when everything is imported, waits for a line, edits, and says "done". With the
method "kfade cholesky" factors are kept without eigenvectors. With the method "mesh" it says in
JSON what a device holds of the arrays that are really made on all the devices of the process, and
what was planned.
"""

import json
import sys

import jax
import numpy as np

from jedit import requests
from jedit.core.batch import Batch
from jedit.curvature import Factorize, estimate, inverted, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches
from jedit.methods import kfade
from jedit.models import load_model
from jedit.recipes.folders.places import SELECT
from jedit.recipes.plan.plan import Work, asked, plan
from jedit.recipes.plan.programs import inverse_bytes
from jedit.requests import Forgetting, Natural, Recovery
from jedit.requests.forget import held_out


def rows(number, length, vocab, seed):
    tokens = np.random.default_rng(seed).integers(1, vocab, (number, length + 1)).astype(np.int32)
    counts = np.ones((number, length), bool)
    return Batch(tokens[:, :-1], tokens[:, 1:], counts, counts)


def edit(folder, method, number, length):
    """Load, fit and edit, as `jedit forget --no-attack` does."""
    apply, params, config = load_model(folder)
    forget, retain = (rows(n, length, config.vocab_size, n) for n in (number // 2, number))
    key = jax.random.key(0)
    method, _, by = method.partition(" ")
    if method == "kfade":
        seen, priced = held_out(retain)
        sets = [list(batches(batch, min(8, len(batch.inputs)))) for batch in (forget, priced)]
        estimator = kfac(apply, Categorical(), select=SELECT, factorize=by or "eigh")
        curvature = estimate(estimator, params, list(batches(seen, 8)), key=key)
        made, _ = kfade(apply, params, curvature, *sets, budget=0.05, damping=0.1)
    else:
        how = Natural(select=SELECT, batch_size=8, recovery=Recovery(4, batch_size=8))
        how = Forgetting(how, likelihood=Categorical(), steps=8)
        made, _ = requests.forget(apply, params, forget, retain, key=key, how=how)
    return jax.block_until_ready(made.blocks)


def on_mesh(folder, number, length):
    """Bytes on the first device, of the parameters, the sums and the curvature."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    apply, params, config = load_model(folder, mesh=mesh)
    place = jax.NamedSharding(mesh, jax.P("data"))
    retain = jax.device_put(rows(number, length, config.vocab_size, 0), place)
    estimator = kfac(apply, Categorical(), select=SELECT)
    sums = estimator.init(params, retain)
    curvature = estimate(estimator, params, retain, key=jax.random.key(0))
    made = [held((params,)), held((sums,)), held((curvature.factors,))]
    work = Work("kfade", forget=8, retain=number, max_len=length + 1, batch_size=number)
    told = plan(folder, work, mesh=mesh)
    planned = [told.weights, told.sums, told.factors]
    # Without eigenvectors: the inverses, and natural steps in them.
    by = Factorize("cholesky")
    estimator = kfac(apply, Categorical(), select=SELECT, factorize=by)
    curvature = estimate(estimator, params, retain, key=jax.random.key(0))
    inverses = inverted(curvature, damping=0.1).inverses.values()
    made.append(held([side.values for side in inverses]))
    work = work._replace(method="natural", factorize=by, attack=False, steps=4, recovery=0)
    planned.append(inverse_bytes(asked(folder, work, mesh=mesh).curvature))
    return {"made": made, "told": planned, "all": told.num_devices}


def held(tree):
    device = jax.local_devices()[0]
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)


def main(folder, method, number, length):
    if method == "mesh":
        sys.stdout.write(json.dumps(on_mesh(folder, int(number), int(length))))
        return
    jax.block_until_ready(jax.numpy.zeros(1))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    edit(folder, method, int(number), int(length))
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
