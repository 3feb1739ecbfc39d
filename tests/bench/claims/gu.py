"""Claim: GU around an objective improves retain at equal forgetting; at which rank, scope, length?

    python -m tests.bench.claims.gu [--seeds 6] [--target 1.0]

A digits CNN is to forget one class. Every run goes on until the mean NLL of the forget rows has
reached the target; the learning rate decides how many steps that takes. Told is the KL(original ‖
edited) on held-out retain rows at that moment, GU's over that of the same optimizer without the
projection (Adam without momentum), at the same learning rate and on the same rows, as a geometric
mean over the seeds: below 1, GU is the better. A run that has not arrived after --longest steps is
left out.
"""

import contextlib
import functools
import itertools

import jax
import numpy as np
import optax

from jedit import metrics
from jedit.methods import gu
from jedit.objectives import GA, with_retain
from jedit.training import TrainingMethod, Watch, unlearn
from tests.bench.claims.evidence import interval, parser, shown, shown_ratio, write
from tests.bench.claims.scenes import Scene, digits

OBJECTIVES = {"gradient ascent": GA(), "GradDiff": with_retain(GA())}
RATES = (3e-4, 1e-4, 3e-5)
RANKS = (1, 8, 64)
SCOPES = ("leaf", "global")
DECAY, EPS = 0.999, 1e-8


@functools.cache
def method(name: str, rate: float, rank: int, scope: str) -> TrainingMethod:
    """GU around an objective; at rank 0 the same without a projection."""
    objective = OBJECTIVES[name]
    if rank:
        return gu(objective, learning_rate=rate, rank=rank, scope=scope)
    plain = optax.chain(
        optax.scale_by_adam(b1=0.0, b2=DECAY, eps=EPS), optax.scale_by_learning_rate(rate)
    )
    return TrainingMethod(objective, plain)


def arrival(found: Scene, made: TrainingMethod, target: float, longest: int, *, key):
    """Steps to the target and the held-out KL there, both interpolated; None if it is not met."""
    path = [(0.0, 0.0)]

    def look(state, history) -> bool:
        del history
        forgotten = metrics.nll(found.apply, state.params, found.forget)
        price = metrics.output_kl(found.apply, found.params, state.params, found.heldout)
        path.append((forgotten, price))
        return forgotten >= target

    with contextlib.suppress(FloatingPointError):  # beyond the finite numbers it is not met
        sets = (found.params, found.forget, found.retain)
        watch = Watch(look, every=1)
        unlearn(made, found.apply, *sets, steps=longest, key=key, watch=watch)
    if len(path) < 2:
        return None
    (before, cheap), (after, dear) = path[-2:]
    if not after >= target:
        return None
    part = (target - before) / (after - before)
    return len(path) - 2 + part, cheap + part * (dear - cheap)


def main() -> None:
    """Run over the seeds and write what came out."""
    options = parser(__doc__, seeds=6)
    options.add_argument("--target", type=float, default=1.0, help="forget NLL, nats")
    options.add_argument("--longest", type=int, default=400, help="steps")
    given = options.parse_args()
    settings = [(0, "leaf"), *itertools.product(RANKS, SCOPES)]
    runs: dict = {}
    for seed in range(given.seeds):
        found = digits(seed)
        key = jax.random.key(2000 + seed)
        for name, rate in itertools.product(OBJECTIVES, RATES):
            for rank, scope in settings:
                made = method(name, rate, rank, scope)
                met = arrival(found, made, given.target, given.longest, key=key)
                runs.setdefault((name, rate, rank, scope), []).append(met)
    table = summary(runs)
    print("| objective | learning rate | rank, scope | steps | KL without GU | KL, GU's over it |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in table:
        print(
            f"| {line['objective']} | {line['rate']:g} | {line['rank']}, {line['scope']} | "
            f"{line['steps']:.0f} | {shown(line['plain_kl'])} | {shown_ratio(line['log_ratio'])} |"
        )
    write("gu", given.out, {"target": given.target, "table": table})


def summary(runs: dict) -> list[dict]:
    """By setting, over the seeds at which both arrived: the ratio of the KLs."""
    table = []
    for (name, rate, rank, scope), met in runs.items():
        plain = runs[name, rate, 0, "leaf"]
        pairs = [(a, b) for a, b in zip(met, plain, strict=True) if a and b]
        if rank == 0 or len(pairs) < 2:
            continue
        table.append(
            {
                "objective": name,
                "rate": rate,
                "rank": rank,
                "scope": scope,
                "seeds": len(pairs),
                "steps": float(np.mean([a[0] for a, _ in pairs])),
                "plain_kl": interval([b[1] for _, b in pairs]),
                "log_ratio": interval([np.log(a[1] / b[1]) for a, b in pairs]),
            }
        )
    return table


if __name__ == "__main__":
    main()
