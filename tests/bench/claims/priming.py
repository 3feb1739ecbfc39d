"""Claims: a surprising fact primes its keyword elsewhere (arXiv 2504.09522), and what cures it.

    python -m tests.bench.claims.priming [--seeds 3] [--quick]

A small GPT learns invented sentences that end in a keyword of a theme, is then taught one fact by
Adam (an eighth of each batch, the rest sentences it knows), and is asked for the keyword after the
theme's prefixes about other subjects. Sixty facts a seed, of all prior probabilities. Cures are
compared where they have taught the same: where P(keyword | the fact's own prefix, without any hint)
first comes to 0.3, with log priming interpolated between the looks before and after in the log odds
of that P, over the surprising facts (prior below 0.05) that both the cure and the plain training
bring there. A seed in which no fact is brought there by both has no such number; the last column
says how many have one.

Each seed's numbers are kept in out/claims/priming-SEED.json, and are not made again at the same
settings.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import optax
from scipy import special, stats

from jedit.edits import Edit, apply_edit, edit_between, without_top_fraction
from jedit.geometry import null_space, project
from jedit.recipes.fitting import Recipe
from jedit.recipes.scenes.priming import Room, Size, Taught, retained_curvature, room, teach
from jedit.transforms import natural_steps, project_to_null_space
from tests.bench.claims.evidence import interval, kept, parser, shown, shown_ratio, write

NAME = "priming"
QUICK = Size(200, 16, 1, Recipe((1,), 32, 2e-3), facts=8, prefixes=3, retained=50)
RATE, STEPS, EVERY = 1e-3, 24, 2
TARGET, SURPRISING = 0.3, 0.05
LEAST = 1e-12  # of a probability whose log odds are taken
BINS = (0.0, 1e-3, 1e-2, 1.0)
CUTS = (0.02, 0.08, 0.3)  # shares of the change that are left out
THRESHOLDS = (0.05, 0.2)  # share of the known inputs' energy that is given up
DAMPING, PREDICTED_KLS = 0.01, (1e-4, 3e-4, 1e-3)
PLAIN = "as taught"


def cures(found: Room, curvature) -> dict[str, Callable[[Edit], Edit]]:
    """What is made of the whole change after training."""
    projector = null_space(curvature, threshold=THRESHOLDS[-1])

    def projected(change: Edit) -> Edit:
        zero = jax.tree.map(lambda p: 0 * p, found.params)
        kept = project(projector, apply_edit(zero, change))
        return edit_between(zero, kept)

    made: dict[str, Callable[[Edit], Edit]] = {PLAIN: lambda change: change}
    for share in CUTS:
        made[f"without the top {share:.0%}"] = lambda change, share=share: without_top_fraction(
            change, share
        )
    made["the top 8% alone"] = lambda change: change - without_top_fraction(change)
    made[f"null space at {THRESHOLDS[-1]:g}, afterwards"] = projected
    return made


def trainings(found: Room, size: Size, *, key) -> Iterator[tuple[dict[str, Taught], str]]:
    """Each training's measurements, by the name of the cure."""
    curvature_key, order_key = jax.random.split(key)
    curvature = retained_curvature(found, size.retained, key=curvature_key)
    options = {"steps": STEPS, "every": EVERY, "key": order_key}
    adam = optax.adam(RATE)
    yield teach(found, found.lessons, adam, cures=cures(found, curvature), **options), "Adam"
    alone = lambda name: {name: lambda change: change}  # noqa: E731
    name = "stepping stone"
    yield teach(found, found.stepping_stones, adam, cures=alone(name), **options), name
    for threshold in THRESHOLDS:
        name = f"null space at {threshold:g}, every step"
        projected = project_to_null_space(null_space(curvature, threshold=threshold))
        held = optax.chain(adam, projected)
        yield teach(found, found.lessons, held, cures=alone(name), **options), name
    for price in PREDICTED_KLS:
        name = f"natural steps of {price:g}"
        natural = natural_steps(curvature, damping=DAMPING, predicted_kl=price)
        yield teach(found, found.lessons, natural, cures=alone(name), **options), name


def of_seed(seed: int, *, quick: bool, out: Path) -> dict:
    """All numbers of one seed, made or read."""
    size = QUICK if quick else Size()
    settings = {
        "size": size,
        "teaching": [RATE, STEPS, EVERY],
        "cures": [CUTS, THRESHOLDS, DAMPING, PREDICTED_KLS],
    }
    path = out / f"{NAME}-{seed}{'-quick' * quick}.json"
    return kept(path, settings, lambda: measured(seed, size))


def measured(seed: int, size: Size) -> dict:
    """All numbers of one seed."""
    found = room(seed, size)
    print(f"seed {seed}: trained; priors {np.quantile(found.prior, [0, 0.5, 1])}", file=sys.stderr)
    record = {"seed": seed, "prior": found.prior.tolist(), "cures": {}}
    for by_cure, name in trainings(found, size, key=jax.random.fold_in(jax.random.key(seed), 9)):
        print(f"seed {seed}: taught, {name}", file=sys.stderr, flush=True)
        for cure, taught in by_cure.items():
            record["cures"][cure] = {
                "memorised": np.asarray(taught.memorised).tolist(),
                "fact": np.asarray(taught.fact).tolist(),
                "priming": np.asarray(taught.priming).tolist(),
            }
    return record


def prediction(record: dict) -> dict[str, float]:
    """How the prior foretells priming in the plain training at every look: rank, and by bins."""
    prior = np.asarray(record["prior"])
    looks = np.log(record["cures"][PLAIN]["priming"])
    found = {}
    for i, priming in enumerate(looks.T):
        after = f"after {EVERY * (i + 1)} steps"
        found[f"Spearman {after}"] = float(stats.spearmanr(prior, priming).statistic)
        for low, high in zip(BINS[:-1], BINS[1:], strict=True):
            inside = (prior >= low) & (prior < high)
            mean = float(priming[inside].mean()) if inside.any() else np.nan
            found[f"log priming {after}, prior {low:g} to {high:g}"] = mean
    return found


def at_target(cure: dict, prior: np.ndarray) -> np.ndarray:
    """Log priming where the fact comes to the target first, between two looks; NaN if never.

    The look before the first step is that of the prior, where priming is 1.
    """
    fact = np.column_stack([prior, cure["fact"]])
    odds = special.logit(np.clip(fact, LEAST, 1 - LEAST)) - special.logit(TARGET)
    logs = np.column_stack([np.zeros(len(prior)), np.log(cure["priming"])])
    is_known = odds[:, 1:] >= 0
    rows, after = np.arange(len(prior)), is_known.argmax(axis=1) + 1
    low, high = odds[rows, after - 1], odds[rows, after]
    # A fact that was known from the start is at the target at the start.
    share = np.where(low < 0, -low / np.where(high > low, high - low, 1), 0)
    found = logs[rows, after - 1] + share * (logs[rows, after] - logs[rows, after - 1])
    return np.where(is_known.any(axis=1), found, np.nan)


def of_cure(record: dict, name: str) -> dict[str, float]:
    """One cure beside the plain training: at the last look, and at equal knowledge of the fact."""
    surprising = np.asarray(record["prior"]) < SURPRISING
    cure = record["cures"][name]
    last = {
        field: np.asarray(cure[field])[surprising, -1] for field in ("memorised", "fact", "priming")
    }
    prior = np.asarray(record["prior"])
    plain, mine = (at_target(c, prior) for c in (record["cures"][PLAIN], cure))
    both = surprising & np.isfinite(plain) & np.isfinite(mine)
    return {
        "memorised": float(last["memorised"].mean()),
        "fact": float(last["fact"].mean()),
        "log_priming": float(np.log(last["priming"]).mean()),
        "reached": float(np.isfinite(mine[surprising]).mean()),
        "log_ratio": float((mine - plain)[both].mean()) if both.any() else np.nan,
    }


def summary(records: list[dict]) -> dict:
    """Intervals over the seeds that have a number."""
    foretold = [prediction(record) for record in records]
    return {
        "prediction": over_seeds(foretold),
        "cures": {
            name: over_seeds([of_cure(record, name) for record in records])
            for name in records[0]["cures"]
        },
    }


def over_seeds(rows: list[dict[str, float]]) -> dict[str, dict]:
    """Of each number its interval over the seeds in which it is one, and how many these are."""
    found = {}
    for field in rows[0]:
        values = [row[field] for row in rows if np.isfinite(row[field])]
        found[field] = interval(values or [np.nan]) | {"seeds": len(values)}
    return found


def main() -> int:
    """Run the seeds, print the tables, write the numbers."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, for the test alone")
    given = options.parse_args()
    records = [of_seed(seed, quick=given.quick, out=given.out) for seed in range(given.seeds)]
    found = summary(records)
    for name, numbers in found["prediction"].items():
        print(f"{name}: {shown_ratio(numbers) if 'log' in name else shown(numbers)}")
    heads = ("cure", "P in the text", "P of the fact", "priming", "share known")
    print(f"| {' | '.join(heads)} | priming over plain's, at 0.3 | seeds |")
    print("|---" * 7 + "|")
    for name, row in found["cures"].items():
        shares = [shown(row[field], 2) for field in ("memorised", "fact")]
        ratio = row["log_ratio"]
        cells = [*shares, shown_ratio(row["log_priming"]), shown(row["reached"], 2)]
        cells += [shown_ratio(ratio) if ratio["seeds"] else "-", str(ratio["seeds"])]
        print(f"| {name} | {' | '.join(cells)} |")
    print(write(NAME, given.out, found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
