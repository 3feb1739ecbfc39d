"""Claim: the more alike forget and retain gradients are, the more ROSU keeps that UAM loses, at the
same forgetting; where they are at a right angle, the two are equal.

    python -m tests.bench.claims.coupling [--seeds 5] [--steps 60] [--quick]

A digits CNN is stopped early, so that its gradients are not nothing. What is forgotten are a
hundred images: of one class, of all the others, or a mixture, whose share sets the cosine of the
two gradients; the class's other images are in no set. Both methods run at the same nine points
(three rates of SGD with momentum 0.9, three radii) and are looked at four times. Compared is the
held-out retain loss at like forgetting: the smallest of all points and looks whose forget loss has
risen by at least half of what the weaker of the two reaches at its most. The slope over the
cosine is stated at fixed rises too.
"""

import functools
from typing import Any

import jax
import numpy as np

from jedit.core.batch import Batch
from jedit.geometry import retain_orthogonal
from jedit.methods.trained.rosu import rosu, uam
from jedit.objectives import RetainNLL
from jedit.recipes.comparison.trajectories import ascend
from jedit.recipes.scenes.digits import LABEL, RECIPE
from jedit.recipes.vision.points import SGD
from tests.bench.claims.evidence import interval, kept, parser, shown, write
from tests.bench.claims.scenes import CNN, SHARE_SEEN, digits_model

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RATES = (0.003, 0.01, 0.03)
RADII = (0.1, 0.3, 1.0)
SIZE = 100
RISES = (None, 0.25, 0.5, 1.0)  # of the forget loss; None: half of the weaker method's most
METHODS = {"UAM": uam, "ROSU": rosu}


@functools.cache
def method_of(name: str, radius: float):
    """One value for all seeds and shares, so that they share what is compiled."""
    return METHODS[name](SGD, radius=radius)._replace(batch_size=32)


def sets_of(rows, share: float, rng: np.random.Generator) -> tuple[Batch, Batch, Batch]:
    """The forget set, the retain rows that a method sees, and those held out.

    Of every share they are of the same sizes.
    """
    mine = rng.permutation(np.flatnonzero(rows.labels == LABEL))
    others = rng.permutation(np.flatnonzero(rows.labels != LABEL))
    count = round(share * SIZE)
    forget = np.concatenate([mine[: SIZE - count], others[:count]])
    seen, heldout = np.split(others[SIZE:], [round(SHARE_SEEN * (len(others) - SIZE))])
    return tuple(rows.take(part).as_batch() for part in (forget, seen, heldout))


@jax.jit
def nll(params, batch: Batch):
    """The mean loss, in nats."""
    return RetainNLL()(CNN, params, None, batch)[0]


@jax.jit
def cosine(params, forget: Batch, retain: Batch):
    """Of the two losses' gradients."""
    return retain_orthogonal(*(jax.grad(nll)(params, x) for x in (forget, retain)))[1].cos


def paths_of(name: str, params, sets, looks: tuple[int, ...], *, key) -> list[list[float]]:
    """The forget and the held-out loss, at every point and look of a method."""
    forget, seen, heldout = sets
    found = []
    for radius in RADII:
        runs = ascend(
            method_of(name, radius),
            CNN,
            params,
            forget,
            seen,
            learning_rates=RATES,
            looks=looks,
            key=jax.random.clone(key),  # both methods and all points see the same rows
        )
        for run in runs:
            found += [[float(nll(p, forget)), float(nll(p, heldout))] for *_, p in run]
    return found


def advantage(
    start: float, paths: dict[str, list[list[float]]], rise: float | None = None
) -> dict[str, float] | None:
    """UAM's held-out loss less ROSU's, in nats, at like forgetting; None where one falls short.

    Args:
        start: the forget loss before.
        paths: of each method, the forget and the held-out loss at every point and look.
        rise: of the forget loss, at least, nats; None: half of what the weaker one reaches.
    """
    arrays = {name: np.asarray(path, np.float64) for name, path in paths.items()}
    arrays = {name: path[np.isfinite(path).all(1)] for name, path in arrays.items()}
    if any(not len(path) for path in arrays.values()):
        return None
    most = min(path[:, 0].max() - start for path in arrays.values())
    level = most / 2 if rise is None else rise
    if most <= 0 or level > most:
        return None
    best = {n: path[path[:, 0] - start >= level, 1].min() for n, path in arrays.items()}
    return {"level": float(level), "saved": float(best["UAM"] - best["ROSU"])}


def one_seed(seed: int, epochs: int, looks: tuple[int, ...], shares=SHARES) -> dict[str, Any]:
    """Both methods at every share."""
    rows, _, fit, cut = digits_model(seed, RECIPE._replace(epochs=(epochs,)))
    params, lines = fit(rows), []
    for i, share in enumerate(shares):
        sets = sets_of(rows, share, np.random.default_rng([seed, i]))
        key = jax.random.fold_in(cut, i)
        paths = {name: paths_of(name, params, sets, looks, key=key) for name in METHODS}
        start = float(nll(params, sets[0]))
        cos = float(cosine(params, *sets[:2]))
        found = advantage(start, paths)
        lines.append({"share": share, "cos": cos, "start": start, "found": found, "paths": paths})
        print(f"seed {seed}, share {share}: cosine {cos:.2f}, {found}", flush=True)
    return {"lines": lines}


def summary(seeds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """By share: the cosine and what ROSU saves; over all: the slope of the one on the other."""
    table = []
    for at in zip(*seeds, strict=True):
        ours = [line["found"]["saved"] for line in at if line["found"]]
        line = {"share": at[0]["share"], "cos": interval([x["cos"] for x in at])}
        table.append(line | {"decided": len(ours), "saved": interval(ours) if ours else None})
    return {"table": table, "slopes": {str(rise): slope_of(seeds, rise) for rise in RISES}}


def slope_of(seeds: list[list[dict[str, Any]]], rise: float | None) -> dict[str, Any] | None:
    """The interval over the seeds of what ROSU saves more for a cosine of 1, nats."""
    slopes = []
    for lines in seeds:
        found = [(x["cos"], advantage(x["start"], x["paths"], rise)) for x in lines]
        points = [(cos, saved["saved"]) for cos, saved in found if saved]
        if len(points) > 2:
            slopes.append(np.polyfit(*np.array(points).T, 1)[0])
    return interval(slopes) if slopes else None


def main() -> None:
    """Run over the seeds and write what came out."""
    options = parser(__doc__, seeds=5)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--quick", action="store_true", help="two shares, few steps")
    given = options.parse_args()
    steps, shares = (4, (0.0, 1.0)) if given.quick else (given.steps, SHARES)
    looks = tuple(steps * i // 4 for i in range(1, 5))
    settings = {"epochs": given.epochs, "looks": looks, "shares": shares, "rates": RATES}
    settings |= {"radii": RADII, "size": SIZE}
    seeds = []
    for seed in range(given.seeds):
        make = functools.partial(one_seed, seed, given.epochs, looks, shares)
        seeds.append(kept(given.out / "coupling" / f"seed{seed}.json", settings, make)["lines"])
    found = summary(seeds)
    print("| share | cosine | seeds decided | held-out retain loss saved by ROSU, nats |")
    print("| --- | --- | --- | --- |")
    for line in found["table"]:
        saved = shown(line["saved"]) if line["saved"] else "-"
        print(f"| {line['share']:g} | {shown(line['cos'])} | {line['decided']} | {saved} |")
    for rise, slope in found["slopes"].items():
        if slope:
            print(f"slope at a rise of {rise}, nats for a cosine of 1: {shown(slope)}")
    write("coupling", given.out, {**settings, **found})


if __name__ == "__main__":
    main()
