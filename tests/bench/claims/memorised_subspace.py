"""Claims: memorised-subspace pruning (arXiv 2406.18566) on a diffusion model that knows 16 digits.

    python -m tests.bench.claims.memorised_subspace [--seeds 3] [--quick]

A denoiser learns scikit-learn's digits by class prompts, and 16 more images by heart, each under a
prompt of its own and forty times in the training data. Every edit is judged by the share of the
memorised prompts' samples that are copies of their image (nearer to it than a third of the distance
to any other training image), by whether class prompts still give the digit asked for, and by the
Fréchet distance of their samples from test images over a classifier's logits. A method's best point
is that whose memorised prompts' samples are about as far from their image as the retrained model's,
among those whose accuracy is within 0.05 of the untouched model's.

Each seed's numbers are kept in out/claims/memorised_subspace-SEED.json, and are not made again at
the same settings.
"""

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import PyTree

from jedit.recipes.progress import Say
from jedit.recipes.scenes.diffusion import (
    FIRST,
    NUM_CLASSES,
    Judgement,
    Room,
    Size,
    judge,
    room,
    samples,
)
from jedit.recipes.scenes.diffusion_edits import (
    by_graddiff,
    by_kfade,
    by_salun,
    prune,
    prune_at_random,
    prune_top,
)
from tests.bench.claims.evidence import interval, kept, parser, shown, write

NAME = "memorised_subspace"
SIZE = Size(copies=40)
QUICK = Size(memorised=4, copies=10, width=16, layers=1, steps=40, noise_steps=20)
BUDGETS = (0.01, 0.03, 0.1, 0.3)
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05)
RATES, DESCENTS, MASKED = (1e-4, 3e-4), (8, 32), (50, 200)  # of GradDiff, and steps of SalUn
LOST = 0.05  # of the accuracy, at a best point
HALF_SHARE = 0.02
REFERENCES = ("untouched", "retrained")


def points(found: Room, *, quick: bool, key) -> list[tuple[str, float, PyTree]]:
    """(method, strength, params) of every method at every strength."""
    shares = SHARES[-1:] if quick else SHARES
    number = len(found.memorised)
    quarters = [list(range(i, number, 4)) for i in range(4)]
    made = [("untouched", 0.0, found.original), ("retrained", 0.0, found.retrain())]
    pruned = list(prune(found, shares, key=key))
    made += [("pruned", s, p) for s, p in pruned]
    made += [("random weights", s, prune_at_random(found, p, key=key)) for s, p in pruned]
    made += [("top score alone", s, p) for s, p in prune_top(found, shares, key=key)]
    made += [
        ("pruned, all of four sets", s, p)
        for s, p in prune(found, shares, key=key, sets=quarters, agreement="all")
    ]
    made += [("K-FADE", s, p) for s, p in by_kfade(found, (0.1,) if quick else BUDGETS, key=key)]
    for rate in RATES[:1] if quick else RATES:
        steps = (2,) if quick else DESCENTS
        made += [
            (f"GradDiff {rate:g}", s, p) for s, p in by_graddiff(found, steps, rate=rate, key=key)
        ]
        steps = (2,) if quick else MASKED
        made += [(f"SalUn {rate:g}", s, p) for s, p in by_salun(found, steps, rate=rate, key=key)]
    return made


def of_seed(seed: int, *, quick: bool, out: Path, say: Say) -> dict:
    """All numbers of one seed, made or read."""
    settings = {
        "size": QUICK if quick else SIZE,
        "strengths": [BUDGETS, SHARES, HALF_SHARE, RATES, DESCENTS, MASKED],
    }
    path = out / f"{NAME}-{seed}{'-quick' * quick}.json"
    return kept(path, settings, lambda: measured(seed, quick=quick, out=out, say=say))


def measured(seed: int, *, quick: bool, out: Path, say: Say) -> dict:
    """All numbers of one seed; seed 0 leaves a picture too."""
    found = room(seed, QUICK if quick else SIZE, say)
    key = jax.random.fold_in(jax.random.key(seed), 7)
    edit_key, judge_key, half_key = jax.random.split(key, 3)
    rows, models = [], {}
    for method, strength, params in points(found, quick=quick, key=edit_key):
        judged = judge(found, params, key=judge_key, draws=2 if quick else 16)
        rows.append({"method": method, "strength": strength, **judged._asdict()})
        models[method, strength] = params
        say(f"{method} at {strength:g}: {judged}")
    record = {"seed": seed, "points": rows, "halves": halves(found, quick=quick, key=half_key)}
    if seed == 0:
        out.mkdir(parents=True, exist_ok=True)
        shown_models = {
            method: models[method, strength]
            for method, strength in chosen(rows).items()
            if (method, strength) in models
        }
        picture(found, shown_models, out / f"{NAME}.png", key=judge_key)
    return record


def halves(found: Room, *, quick: bool, key) -> dict[str, float]:
    """Copies before and after a pruning located on one half of the memorised prompts, by half.

    As a control, after one located on the digits' prompts: what that removes too is general damage.
    """
    number = len(found.memorised)
    located, other = np.arange(0, number, 2), np.arange(1, number, 2)
    models = {"before": found.original}
    for when, prompts in (("after", located.tolist()), ("control", list(range(-NUM_CLASSES, 0)))):
        ((_, models[when]),) = prune(found, (HALF_SHARE,), key=key, sets=[prompts])
    draws = 2 if quick else 16
    numbers = {}
    for name, half in (("located", located), ("other", other)):
        for when, model in models.items():
            measured = judge(found, model, key=key, draws=draws, prompts=jnp.asarray(half))
            numbers[f"{name}_{when}"] = measured.memorised
            numbers[f"accuracy_{when}"] = measured.accuracy
    return numbers


def chosen(rows: list[dict]) -> dict[str, float]:
    """The strength of every method's best point by the rule; none where no point keeps it."""
    known = {r["method"]: r for r in rows if r["method"] in REFERENCES}
    least, far = known["untouched"]["accuracy"] - LOST, known["retrained"]["distance"]
    best: dict[str, float] = {}
    for family in dict.fromkeys(family_of(r["method"]) for r in rows):
        mine = [r for r in rows if family_of(r["method"]) == family]
        kept = [r for r in mine if r["accuracy"] >= least]
        if kept:
            row = min(kept, key=lambda r: abs(r["distance"] - far))
            best[row["method"]] = row["strength"]
    return best


def family_of(method: str) -> str:
    """The method without its learning rate."""
    return method.rpartition(" ")[0] if method[-1].isdigit() else method


def summary(records: list[dict]) -> dict:
    """Intervals over the seeds: all points, best points, and the claims' numbers."""
    table, best = {}, {}
    for record in records:
        rows = record["points"]
        for row in rows:
            table.setdefault(f"{row['method']} {row['strength']:g}", []).append(row)
        for method, strength in chosen(rows).items():
            (row,) = (r for r in rows if (r["method"], r["strength"]) == (method, strength))
            best.setdefault(family_of(method), []).append(row)

    def over(rows: list[dict]) -> dict:
        return {f: interval([r[f] for r in rows]) for f in Judgement._fields} | {"seeds": len(rows)}

    drops = [
        (h["other_before"] - h["other_after"]) / max(h["located_before"] - h["located_after"], 1e-9)
        for h in (r["halves"] for r in records)
    ]
    return {
        "points": {name: over(rows) for name, rows in table.items()},
        "best": {name: over(rows) for name, rows in best.items()},
        "shared": interval(drops),
        "halves": {
            name: interval([record["halves"][name] for record in records])
            for name in records[0]["halves"]
        },
    }


def picture(found: Room, models: dict[str, PyTree], path: Path, *, key) -> None:
    """A row of samples for each model: memorised prompts left, digits right; originals on top."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    number = min(8, len(found.memorised))
    prompts = np.concatenate([np.arange(number) + FIRST, np.arange(10) + 1])
    top = np.full((len(prompts), 64), -1.0)
    top[:number] = np.asarray(found.memorised[:number])
    rows = {"training image": top} | {
        name: np.asarray(samples(found, params, jnp.asarray(prompts), key=key))
        for name, params in models.items()
    }
    size = (0.5 * len(prompts) + 2, 0.5 * len(rows))
    figure, axes = plt.subplots(len(rows), len(prompts), figsize=size)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for image, axis in zip(images, line, strict=True):
            axis.imshow(image.reshape(8, 8), cmap="gray", vmin=-1, vmax=1)
            axis.set_axis_off()
        line[0].text(-1, 4, name, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(left=0.25, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.05)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Run the seeds, print the tables, write the numbers."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, for the test alone")
    given = options.parse_args()
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    records = [of_seed(s, quick=given.quick, out=given.out, say=say) for s in range(given.seeds)]
    found = summary(records)
    for kind in ("points", "best"):
        print(f"| {kind} | copies | distance | confidence | accuracy | Fréchet | seeds |")
        print("|---|---|---|---|---|---|---|")
        for name, row in found[kind].items():
            cells = " | ".join(shown(row[f], 2) for f in Judgement._fields)
            print(f"| {name} | {cells} | {row['seeds']} |")
    print(f"drop of the other half over the located half's: {shown(found['shared'])}")
    for name, copies in found["halves"].items():
        print(f"{name}: {shown(copies, 2)}")
    print(write(NAME, given.out, found))
    return 0 if all(math.isfinite(r["points"][0]["accuracy"]) for r in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
