"""Claims: what methods that replay keep, while a model learns on.

    python -m tests.bench.claims.replay [--seeds 5] [--author-seeds 3] [--only digits] [--quick]

Digits, two new classes a task, five tasks, an MLP of one hidden layer, SGD, 60 updates a task, 20
images kept in all, scores at every update:

    uer      UER (new rows by their angle) ends with a higher mean accuracy than replay.
    k-fpf    k-FPF, which replays now and then into its most sensitive module alone, ends no lower
             than replay at each update, of as many updates; and higher than k-FPF of the other
             module, and no lower than k-FPF of all modules.
    views    View batches, a row in four shifts at once and then at rest, end higher than the same
             images in any order.

Invented authors, a GPT of a quarter of a million parameters, four parts of 64 rows, Adam, 24 rows
kept in all; a row is remembered if its keyword is the likeliest:

    gere     GeRe's threshold margin on rows of the first part keeps more of that part than the
             same rows replayed by their NLL alone.
    words    View batches of a row in four wordings end higher than the same rows in any order.
    rft      From the same model half-way through a new part, RFT on its own answers (by NLL and by
             the policy gradient) keeps more of the old part than SFT where it remembers as much of
             the new one.

Each method is tried over a grid of as many points (rates x strengths) on seeds that are not
reported, the best final mean is run on the seeds that are. Intervals are 95%, of paired
differences. Each run's numbers are kept in `out`, and a second call takes them from there.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedit.methods import RftStages, rft
from jedit.objectives import (
    GRPO,
    GeRe,
    LearnNLL,
    ViewBatch,
    with_retain,
)
from jedit.recipes.learners import KeepGeneral, KeepRows
from jedit.recipes.learning_on import Learner, learn_on, plain
from jedit.recipes.scenes.author_stream import (
    AuthorStream,
    asks,
    author_stream,
    in_views,
    remembered,
)
from jedit.tracing import Entering
from jedit.training import TrainingMethod, Watch, unlearn
from tests.bench.claims.evidence import interval, kept, parser, shown, write
from tests.bench.claims.replay_digits import (
    DIGIT_GRIDS,
    QUICK,
    Size,
    adam,
    figures,
    of_digits,
    spread_out,
)

# Authors.


@functools.cache
def stream_of(seed: int, size: Size) -> AuthorStream:
    """One seed's authors."""
    facts = 8 if size.authors_per_part > 1 else 4
    return author_stream(seed=seed, authors_per_part=size.authors_per_part, facts_per_author=facts)


def author_learner(name: str, rate: float, strength: Any, stream: AuthorStream, size: Size):
    """Return how a method learns, and the parts as it is given them."""
    optimizer, batch = adam(rate), size.author_batch
    tasks: Any = stream.tasks
    replays = with_retain(LearnNLL(), weight=strength) if name != "naive" else LearnNLL()
    keeps: dict[str, Any] = {
        "naive": None,
        "replay": KeepRows(size.author_memory),
        "general": KeepGeneral(size.author_memory),
        "GeRe": KeepGeneral(size.author_memory, Entering("head/kernel")),
        "wordings": KeepRows(size.author_memory),
        "view batches": KeepRows(size.author_memory // 4),
    }
    objective: Any = GeRe(Entering("head/kernel"), strength) if name == "GeRe" else replays
    first = None
    if name in ("wordings", "view batches"):
        views = [in_views(stream, part) for part in range(len(stream.parts))]
        tasks = views if name == "view batches" else [spread_out(v) for v in views]
    if name == "view batches":
        objective, batch = ViewBatch(objective), batch // 4
        first = TrainingMethod(ViewBatch(LearnNLL()), optimizer, batch_size=batch)
    method = TrainingMethod(objective, optimizer, batch_size=batch)
    return Learner(method, keeps[name], first), tasks


AUTHOR_GRIDS: dict[str, tuple[Any, ...]] = {
    "naive": (None,),
    "replay": (1.0, 3.0),
    "general": (1.0, 3.0),
    "GeRe": (10.0, 100.0),
    "wordings": (1.0, 3.0),
    "view batches": (1.0, 3.0),
}


def of_authors(name: str, rate: float, strength: Any, seed: int, size: Size) -> dict[str, Any]:
    """One run on the authors."""
    stream = stream_of(seed, size)
    learner, tasks = author_learner(name, rate, strength, stream, size)
    learnt = learn_on(
        learner,
        stream.apply,
        stream.params,
        tasks,
        steps=size.author_steps,
        every=size.every,
        evaluate=remembered(stream.apply, stream.tests),
        key=jax.random.fold_in(jax.random.key(seed), 7),
    )
    return figures(learnt) | {"scores": learnt.scores.tolist()}


def of_rft(seed: int, size: Size) -> dict[str, Any]:
    """From one model half-way through the second part: SFT, and RFT by NLL and by its gradient."""
    stream = stream_of(seed, size)
    key, evaluate = jax.random.key(seed), remembered(stream.apply, stream.tests[:2])
    params, half = stream.params, []

    def halfway(state, _) -> None:
        # From a model that says a third of it, no drawn answer was right: nothing to learn from.
        if not half and float(evaluate(state.params)[1]) >= 3 / 4:
            half.append(jax.tree.map(jnp.copy, state.params))

    for part, rate in ((0, size.author_rates[-1]), (1, size.author_rates[0])):
        params, _ = unlearn(
            plain(adam(rate), size.author_batch),
            stream.apply,
            params,
            stream.tasks[part],
            steps=size.author_steps,
            key=jax.random.fold_in(key, part),
            watch=Watch(halfway, every=2) if part else None,
        )
    params = half[0] if half else params
    found: dict[str, Any] = {"start": np.asarray(evaluate(params)).tolist()}
    for rate in size.rft_rates:
        looks: list[list[float]] = []

        def look(state, _, looks=looks) -> None:
            looks.append(np.asarray(evaluate(state.params)).tolist())

        unlearn(
            plain(adam(rate), size.author_batch),
            stream.apply,
            params,
            stream.tasks[1],
            steps=2 * size.draws,
            key=jax.random.fold_in(key, 2),
            watch=Watch(look, every=max(1, 2 * size.draws // 12)),
        )
        found[f"SFT, {rate:g}"] = looks
        for name, objective in (("NLL", None), ("policy", GRPO())):
            mine: list[list[float]] = []

            def see(number, params, mine=mine) -> None:
                if number % max(1, size.draws // 12) == 0:
                    mine.append(np.asarray(evaluate(params)).tolist())

            edit, info = rft(
                stream.apply,
                params,
                asks(stream, 1),
                adam(rate),
                key=jax.random.fold_in(key, 3),
                stages=RftStages(steps=size.draws),
                objective=objective,
                look=see,
            )
            del edit
            found[f"RFT by {name}, {rate:g}"] = mine
            found[f"rewards of RFT by {name}, {rate:g}"] = info.rewards.tolist()
    return found


def kept_at_most(looks: list[list[float]], start: list[float], new: float) -> float:
    """The most that is remembered of the old part where at least so much is of the new one."""
    old = [a for a, b in [start, *looks] if b >= new]
    return max(old, default=float("nan"))


# Together.


def chosen(
    scene: str, run: Callable, grids: dict[str, tuple[Any, ...]], rates, size: Size, out: Path
) -> dict[str, tuple[float, Any]]:
    """The rate and strength of the best mean final score on the tuning seeds, by method."""
    best = {}
    for name, strengths in grids.items():
        tried = {}
        for rate in rates:
            for strength in strengths:
                finals = [
                    one(scene, run, name, rate, strength, seed, size, out)["final"]
                    for seed in size.tuning
                ]
                tried[(rate, strength)] = float(np.mean(finals))
        best[name] = max(tried, key=tried.__getitem__)
        print(scene, name, best[name], {str(k): round(v, 3) for k, v in tried.items()}, flush=True)
    return best


def one(scene, run, name, rate, strength, seed, size: Size, out: Path) -> dict[str, Any]:  # noqa: PLR0913, E501
    """One run, kept."""
    settings = {"name": name, "rate": rate, "strength": strength, "seed": seed, **size._asdict()}
    label = f"{name}-{rate:g}-{strength}-{seed}".replace(" ", "_").replace(",", "")
    path = out / "replay" / scene / f"{label}.json"
    return kept(path, settings, lambda: run(name, rate, strength, seed, size))


def compared(runs: dict[str, list[dict]], pairs, quantity: str) -> dict[str, Any]:
    """Paired differences, the first less the second."""
    return {
        f"{a} - {b}": interval(
            [x[quantity] - y[quantity] for x, y in zip(runs[a], runs[b], strict=True)]
        )
        for a, b in pairs
        if a in runs and b in runs
    }


DIGIT_PAIRS = (
    ("UER", "replay"),
    ("k-FPF", "replay"),
    ("k-FPF", "k-FPF, other"),
    ("k-FPF", "k-FPF, all"),
    ("view batches", "shifts"),
    ("view batches", "shifts, same kept"),
    ("view batches", "replay"),
    ("replay", "naive"),
)
AUTHOR_PAIRS = (
    ("GeRe", "general"),
    ("GeRe", "replay"),
    ("general", "naive"),
    ("replay", "general"),
    ("view batches", "wordings"),
    ("wordings", "replay"),
)


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, print and write it."""
    options = parser(__doc__, seeds=5)
    options.add_argument("--author-seeds", type=int, default=3, help="how many, counted from 0")
    options.add_argument("--only", nargs="+", choices=("digits", "authors", "rft"))
    options.add_argument("--quick", action="store_true", help="a toy, for the tests")
    given = options.parse_args(arguments)
    size = QUICK if given.quick else Size()
    wanted = given.only or ("digits", "authors", "rft")
    numbers: dict[str, Any] = {"size": size._asdict()}
    for scene, run, grids, rates, seeds, pairs in (
        ("digits", of_digits, DIGIT_GRIDS, size.rates, given.seeds, DIGIT_PAIRS),
        ("authors", of_authors, AUTHOR_GRIDS, size.author_rates, given.author_seeds, AUTHOR_PAIRS),
    ):
        if scene not in wanted:
            continue
        size_here = size if scene == "digits" else size._replace(tuning=size.tuning[:1])
        best = chosen(scene, run, grids, rates, size_here, given.out)
        runs = {
            name: [
                one(scene, run, name, *best[name], s, size_here, given.out) for s in range(seeds)
            ]
            for name in grids
        }
        names = ("final", "first task, final", "last task, final", "min-ACC", "WC-ACC", "WF10")
        means = {
            name: {q: interval([r[q] for r in mine]) for q in names} for name, mine in runs.items()
        }
        print(f"\n| {scene} | rate, strength | {' | '.join(names)} |")
        for name, row in means.items():
            print(f"| {name} | {best[name]} | {' | '.join(shown(row[q]) for q in names)} |")
        differences = {q: compared(runs, pairs, q) for q in names}
        for q in names:
            for pair, found in differences[q].items():
                print(f"{scene}, {q}: {pair} = {shown(found)}", flush=True)
        numbers[scene] = {"best": best, "means": means, "differences": differences}
    if "rft" in wanted:
        records = [
            kept(
                given.out / "replay" / "rft" / f"{seed}.json",
                {"seed": seed, **size._asdict()},
                functools.partial(of_rft, seed, size),
            )
            for seed in range(given.author_seeds)
        ]
        numbers["rft"] = records, of_all_rft(records, size)
    write("replay", given.out, numbers)


def of_all_rft(records: list[dict], size: Size) -> dict[str, Any]:
    """At several gains of the new part, the most of the old one at any rate; SFT against RFT."""
    found: dict[str, Any] = {}
    kinds = ("SFT", "RFT by NLL", "RFT by policy")
    for gain in (0.05, 0.1, 0.2):
        most = {
            kind: [
                max(
                    (
                        x
                        for rate in size.rft_rates
                        if not np.isnan(
                            x := kept_at_most(
                                record[f"{kind}, {rate:g}"],
                                record["start"],
                                record["start"][1] + gain,
                            )
                        )
                    ),
                    default=float("nan"),
                )
                for record in records
            ]
            for kind in kinds
        }
        found[f"gain {gain}"] = most
        print(f"rft, gain {gain}: start {[r['start'] for r in records]} {most}", flush=True)
        for kind in kinds[1:]:
            pairs = [b - a for a, b in zip(most["SFT"], most[kind], strict=True)]
            if len(pairs) > 1 and not np.any(np.isnan(pairs)):
                found[f"gain {gain}, {kind} - SFT"] = interval(pairs)
                print(f"  {kind} - SFT = {shown(interval(pairs))}", flush=True)
    return found


if __name__ == "__main__":
    main()
