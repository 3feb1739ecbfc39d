"""Claim: 300 requests one after the other cost what is kept less when each is filtered, edited as
little as will do, and taken out of the statistics, than when the same edit is repeated.

    python -m tests.bench.claims.continual [--seeds 1]

A GPT learns 64 invented authors of ten facts each; six others it never sees, and their loss is what
counts as forgotten. 27 authors' rows are asked for one by one in random order, and every tenth
request is one that was made before: 300. Of the kept authors 30 are seen by the statistics; seven
are not, and are the tasks of the stability metrics, by the share of answer tokens that come first.

Naive repetition is the same step, at a fixed predicted KL for every request, in the curvature of
the model as it was; at three sizes. "no refresh" is the stream without any look at its statistics,
"nothing learnt again" without its steps back on rows that stay.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches
from jedit.edits import apply_edit
from jedit.recipes.scenes.question_answer import SELECT
from jedit.report.figure import STYLES, save_png
from jedit.requests import Answering, Refresh, Solver, batch_unlearn
from jedit.requests.stream import continual
from tests.bench.claims import evidence
from tests.bench.claims.scenes import Authors, authors_model

TASKS, REPEAT, DAMPING, RANK = 7, 10, 0.1, 8
NAIVE = (1e-6, 3e-6, 3e-5)
WINDOW = 20
SHOWN = {
    "forget_degree": "forgotten share",
    "retained_utility": "retained share",
    "minimum": "min-ACC",
    "worst_case": "WC-ACC",
    "windowed": f"WF^{WINDOW}",
    "edits": "edits",
    "seconds": "s",
}


class Size(NamedTuple):
    """How large all is; the defaults are the claim's."""

    authors: int = 70
    unseen: int = 6
    asked: int = 27
    epochs: int = 12
    every: int = 5  # requests between two looks


class Setting(NamedTuple):
    """A trained model and the stream it is asked; numbers are of rows of `made.data`."""

    made: Authors
    params: PyTree
    enough: float
    seen: np.ndarray
    stream: list[int]
    heldout: list[Batch]


def prepare(seed: int, size: Size) -> Setting:
    """Train the model and draw the stream."""
    made = authors_model(seed, epochs=size.epochs, num_authors=size.authors)
    learnt = 10 * (size.authors - size.unseen)
    params = made.fit(np.arange(learnt))
    enough = metrics.nll(made.apply, params, made.take(np.arange(learnt, 10 * size.authors)))
    rng = np.random.default_rng(seed)
    stream: list[int] = []
    for number in rng.permutation(10 * size.asked):
        if len(stream) % REPEAT == REPEAT - 1:
            stream.append(stream[rng.integers(len(stream))])
        stream.append(int(number))
    stream.append(stream[rng.integers(len(stream))])
    tasks = [np.arange(learnt - 10 * (i + 1), learnt - 10 * i) for i in range(TASKS)]
    seen = np.arange(learnt - 10 * TASKS)
    return Setting(made, params, enough, seen, stream, [made.take(task) for task in tasks])


def naive(setting: Setting, budget: float, key) -> Iterator[tuple[PyTree, int]]:
    """The same edit for every request: params and edits made after each."""
    made, params = setting.made, setting.params
    curvature = estimate(
        kfac(made.apply, Categorical(), select=SELECT),
        params,
        list(batches(made.take(setting.seen), 32)),
        key=key,
    )
    for i, number in enumerate(setting.stream, 1):
        request = jax.tree.map(lambda x, n=number: x[n][None, None], made.data)
        run = {"predicted_kl": budget, "damping": DAMPING, "solver": Solver(rank=RANK)}
        edits, _ = batch_unlearn(made.apply, params, curvature, request, **run)
        params = apply_edit(params, jax.tree.map(lambda x: x[0], edits))
        yield params, i


def streamed(
    setting: Setting,
    key,
    *,
    relearn: int = 32,
    refresh: Refresh = Refresh(),  # noqa: B008
) -> Iterator[tuple[PyTree, int]]:
    """The stream that looks after its statistics."""
    made, edits = setting.made, 0
    stream = continual(
        made.apply,
        kfac(made.apply, Categorical(), select=SELECT),
        made.take(setting.seen),
        enough=setting.enough,
        key=key,
        predicted_kl=1e-3,
        answering=Answering(damping=DAMPING, rank=RANK, relearn=relearn),
        refresh=refresh,
    )
    state = stream.init(setting.params)
    refreshes: dict[str | None, int] = {}
    for number in setting.stream:
        state, info = stream.forget(state, [number])
        edits += info.tries
        refreshes[info.refresh] = refreshes.get(info.refresh, 0) + 1
        yield state.params, edits
    print("refreshes", refreshes, flush=True)


def judged(setting: Setting, run: Callable[[], Iterator], every: int) -> dict[str, Any]:
    """Scores over time, and what they come to."""
    apply, data = setting.made.apply, setting.made.data
    asked = np.unique(setting.stream)
    rows = jax.tree.map(lambda x: x[asked], data)
    forgotten = list(batches(rows, 32))
    kept = list(batches(jax.tree.map(lambda *x: jnp.concatenate(x), *setting.heldout), 35))

    def scores(params: PyTree) -> tuple[list[float], np.ndarray, np.ndarray]:
        tasks = [metrics.accuracy(apply, params, task) for task in setting.heldout]
        found = (metrics.answer_nll_per_row(apply, params, x) for x in (forgotten, kept))
        return tasks, *(np.exp(-loss) for loss in found)

    first, before, before_kept = scores(setting.params)
    tasks, times, by_row, edits, seconds = [first], [0], [before], 0, 0.0
    stream = run()
    for step in range(1, len(setting.stream) + 1):
        start = time.perf_counter()
        params, edits = next(stream)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - start
        if step % every and step < len(setting.stream):
            continue
        now, after, after_kept = scores(params)
        tasks.append(now)
        by_row.append(after)
        times.append(step)
    next(stream, None)  # its last words
    asked_so_far = [np.isin(asked, setting.stream[:t]) for t in times]
    newest = by_row[-1][asked == setting.stream[-1]]
    return {
        "requests": times,
        "kept accuracy": np.mean(tasks, axis=1).tolist(),
        "forgotten probability": [
            float(p[m].mean()) if m.any() else float("nan")
            for p, m in zip(by_row, asked_so_far, strict=True)
        ],
        "forget_degree": metrics.forget_degree(before, by_row[-1]),
        "retained_utility": metrics.retained_utility(before_kept, after_kept),
        "minimum": metrics.minimum_accuracy(tasks),
        "worst_case": metrics.worst_case_accuracy(tasks, 1 - float(newest[0])),
        "windowed": metrics.windowed_forgetting(tasks, max(2, WINDOW // every)),
        "edits": edits,
        "seconds": seconds,
    }


def figure(runs: dict[str, dict[str, Any]]):
    """What is kept and what is forgotten, over the requests; the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, 2, sharex=True)
    titles = {
        "kept accuracy": "Kept authors no statistic has seen:\nanswer tokens that come first",
        "forgotten probability": "All rows forgotten so far:\nprobability of an answer token",
    }
    for axes, (field, title) in zip(panels, titles.items(), strict=True):
        for (name, run), look in zip(runs.items(), STYLES, strict=False):
            style = {**look, "ms": 0, "lw": 1.8}
            axes.plot(run["requests"], run[field], **style, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("requests")
        axes.set_ylim(0, 1.02)
        axes.grid(visible=True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return drawn


def run_seed(seed: int, size: Size) -> dict[str, dict[str, Any]]:
    """All ways of answering one stream."""
    setting = prepare(seed, size)
    key = jax.random.key(seed)
    print(f"seed {seed}: {len(setting.stream)} requests, enough {setting.enough:.2f}", flush=True)
    ways: dict[str, Callable[[], Iterator]] = {
        "stream (ours)": lambda: streamed(setting, jax.random.clone(key)),
        "stream, nothing learnt again": lambda: streamed(setting, jax.random.clone(key), relearn=0),
        "stream, no refresh": lambda: streamed(
            setting, jax.random.clone(key), refresh=Refresh(every=10**6)
        ),
    }
    for budget in NAIVE:
        ways[f"naive, KL {budget:g}"] = lambda budget=budget: naive(
            setting, budget, jax.random.clone(key)
        )
    found = {}
    for name, way in ways.items():
        found[name] = judged(setting, way, size.every)
        print(name, {k: f"{found[name][k]:.3g}" for k in SHOWN}, flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds, print the table, draw the figure."""
    options = evidence.parser(__doc__, seeds=1)
    given = options.parse_args(arguments)
    runs = [run_seed(seed, Size()) for seed in range(given.seeds)]
    print("| | " + " | ".join(SHOWN.values()) + " |")
    print("| --- |" + " --- |" * len(SHOWN))
    summary = {}
    for name in runs[0]:
        summary[name] = {k: evidence.interval([run[name][k] for run in runs]) for k in SHOWN}
        print(f"| {name} | " + " | ".join(evidence.shown(summary[name][k]) for k in SHOWN) + " |")
    path = evidence.write("continual", given.out, {"runs": runs, "summary": summary})
    save_png(figure(runs[0]), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
