"""Claim: a thousand requests are answered in one compiled call, at many times a loop's rate and in
memory that holds no copy of the parameters for each; and a low rank loses nothing of their effect.

    python -m tests.bench.claims.requests [--seeds 1] [--counts 1 10 100 1000]

A request is one row of the authors scene. The loops call, request by request, the same function
compiled for one request, and K-FADE as it is for a single request (one step of given length).
Memory is what the resident set grows by, and the result's own bytes.  The table of ranks compares
with exact damping in the eigenbasis, dense, by the mean rise of a request's own loss.
"""

import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches
from jedit.edits import apply_edit, sum_edits
from jedit.methods import Ascent, kfade
from jedit.metrics import nll, output_kl
from jedit.objectives import GA
from jedit.requests import Solver, balanced, batch_unlearn, interactions
from tests.bench.claims.evidence import parser, write
from tests.bench.claims.scenes import Scene, authors
from tests.bench.measure import matmul_rate

STEP, DAMPING, RANK = 0.02, 0.1, 8
LOOPED = 30  # requests that a loop is timed on


def resident() -> float:
    """Bytes this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def first_requests(found: Scene, number: int) -> Batch:
    """Rows of the scene, one to a request, over again where there are too few."""

    def chosen(forget, retain):
        both = np.concatenate([np.asarray(forget), np.asarray(retain)])
        return jnp.asarray(both[np.arange(number) % len(both)])[:, None]

    return jax.tree.map(chosen, found.forget, found.retain)


def rates(found: Scene, curvature, count: int) -> dict[str, float]:
    """Requests a second of one call, and of the two loops; bytes a request."""
    requests = first_requests(found, count)

    def run(requests: Batch, chunk: int = 100):
        return jax.block_until_ready(
            batch_unlearn(
                found.apply,
                found.params,
                curvature,
                requests,
                damping=DAMPING,
                solver=Solver(rank=RANK, chunk=chunk),
            )
        )

    run(requests)
    before = resident()
    start = time.perf_counter()
    edits, _ = run(requests)
    together = count / (time.perf_counter() - start)
    grown = resident() - before
    each = [jax.tree.map(lambda x, i=i: x[i : i + 1], requests) for i in range(min(count, LOOPED))]
    run(each[0], chunk=1)
    start = time.perf_counter()
    for request in each:
        run(request, chunk=1)
    looped = len(each) / (time.perf_counter() - start)
    singles = [jax.tree.map(lambda x: x[0], request) for request in each[:5]]
    retain = next(iter(batches(found.retain, 32)))

    def single(request: Batch):
        return kfade(
            found.apply,
            found.params,
            curvature,
            request,
            retain,
            damping=DAMPING,
            ascent=Ascent(1, step_size=STEP),
        )

    single(singles[0])
    start = time.perf_counter()
    for request in singles:
        jax.block_until_ready(single(request)[0])
    return {
        "requests a second": together,
        "in a loop": looped,
        "by kfade": len(singles) / (time.perf_counter() - start),
        "result's bytes a request": sum(x.nbytes for x in jax.tree.leaves(edits)) / count,
        "resident bytes a request": grown / count,
    }


def ranks(found: Scene, curvature) -> list[dict]:
    """What a rank and the damping's form do to the edits' effect, at equal predicted KL."""
    requests = first_requests(found, 30)
    loss = jax.jit(lambda p, r: -GA()(found.apply, p, r)[0])
    heldout = list(batches(found.heldout, 32))
    rows = []
    for exact in (True, False):
        for rank in (None, 16, 4, 1):
            edits, info = batch_unlearn(
                found.apply,
                found.params,
                curvature,
                requests,
                predicted_kl=0.002,
                damping=DAMPING,
                solver=Solver(exact, rank),
            )
            gains, kls = [], []
            for r in range(30):
                one = jax.tree.map(lambda x, r=r: x[r], (edits, requests))
                edited = apply_edit(found.params, one[0])
                gains.append(float(loss(edited, one[1]) - info.loss[r]))
                if r % 5 == 0:
                    kls.append(output_kl(found.apply, found.params, edited, heldout))
            rows.append(
                {
                    "damping": "exact" if exact else "factored",
                    "rank": rank or "all",
                    "cut off": float(jnp.mean(info.cut_off)),
                    "predicted gain": float(jnp.mean(info.predicted_gain)),
                    "gain": float(np.mean(gains)),
                    "held-out KL": float(np.mean(kls)),
                }
            )
    return rows


def overlaps(found: Scene, curvature) -> dict[str, dict[str, float]]:
    """The forget set as one request a row: summed, balanced, and edited jointly."""
    requests = jax.tree.map(lambda x: jnp.asarray(x)[:, None], found.forget)
    run = {"damping": DAMPING, "solver": Solver(rank=RANK)}
    given = (found.apply, found.params, curvature)
    edits, info = batch_unlearn(*given, requests, predicted_kl=2e-4, **run)
    weights = balanced(interactions(curvature, edits, damping=DAMPING), ridge=1e-3)
    whole = jax.tree.map(lambda x: jnp.asarray(x)[None], found.forget)
    joint, _ = batch_unlearn(*given, whole, predicted_kl=2e-3, **run)
    chosen = {
        "sum": sum_edits(edits),
        "balanced sum": sum_edits(edits, weights),
        "joint edit": sum_edits(joint),
    }
    forget, heldout = list(batches(found.forget, 32)), list(batches(found.heldout, 32))
    wanted = float(jnp.mean(info.predicted_gain))
    out = {}
    for name, edit in chosen.items():
        edited = apply_edit(found.params, edit)
        gain = nll(found.apply, edited, forget) - nll(found.apply, found.params, forget)
        kl = output_kl(found.apply, found.params, edited, heldout)
        out[name] = {"asked gain": wanted, "gain": gain, "held-out KL": kl}
    return out


def main() -> None:
    """Measure and write what came out."""
    options = parser(__doc__, seeds=1)
    options.add_argument("--counts", nargs="+", type=int, default=[1, 10, 100, 1000])
    given = options.parse_args()
    found = authors(0)
    estimator = kfac(found.apply, Categorical(), select=found.select)
    curvature = estimate(
        estimator, found.params, list(batches(found.retain, 32)), key=jax.random.key(0)
    )
    before = matmul_rate()
    speed = {count: rates(found, curvature, count) for count in given.counts}
    after = matmul_rate()
    print(f"matmul rate before and after: {before / 1e9:.0f} and {after / 1e9:.0f} GFLOP/s")
    for count, row in speed.items():
        print(count, {name: f"{value:.4g}" for name, value in row.items()})
    size = sum(x.size for x in jax.tree.leaves(found.params))
    effect, overlap = ranks(found, curvature), overlaps(found, curvature)
    for row in effect:
        print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()})
    for name, row in overlap.items():
        print(name, {k: f"{v:.3g}" for k, v in row.items()})
    numbers = {"parameters": size, "rates": speed, "ranks": effect, "overlap": overlap}
    write("requests", given.out, numbers | {"matmul": [before, after]})


if __name__ == "__main__":
    main()
