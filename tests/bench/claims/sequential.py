"""1,000 sequential edits of a small model's facts: do the earlier ones and the untouched ones last?

    python -m tests.bench.claims.sequential           five seeds, at the settings below
    python -m tests.bench.claims.sequential --tune    the grid they were chosen from, on seed 100

A subject is a token of its own, and has an object under each of two relations. A GPT learns all
facts; then 50 batches of 20 give 1,000 of them, each of another subject, a new object. What is
kept is fitted once, on facts of other subjects, at the original model. Target values are searched
for on the model as it is at each batch, in one and the same way for all methods.

A fact has survived while its new object is the first of all tokens; untouched facts are counted
likewise, with their old objects. Tuned for the mean of the shares `survived` and `kept` at the end.
"""

import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jedit
from jedit.core.batch import Batch
from jedit.methods import Associations, Layers, Search, alphaedit, memit, target_values
from jedit.models import gpt
from jedit.recipes.fitting import Recipe, train
from jedit.report.figure import STYLES, save_png
from tests.bench.claims import evidence

LAYER = "blocks/0/mlp/down/kernel"
RELATIONS, SUBJECT = 2, 1  # SUBJECT: its position in a prompt
EARLIER = "MEMIT with earlier keys"  # MEMIT that is handed the state too
TUNING_SEED = 100


class Size(NamedTuple):
    """How large all is; the defaults are the claim's."""

    objects: int = 30  # of a relation
    edited: int = 1000  # subjects, as are the next two
    kept: int = 200
    unseen: int = 100
    width: int = 384
    epochs: int = 8
    batch: int = 20
    every: int = 5  # batches between two looks


class Facts(NamedTuple):
    """Prompts (n, 2) of relation and subject, and the object's token (n,)."""

    prompts: jax.Array
    objects: jax.Array

    def batch(self) -> Batch:
        """As a model learns it: the object behind the subject alone."""
        is_last = jnp.zeros(self.prompts.shape, bool).at[:, -1].set(True)
        return Batch(self.prompts, jnp.where(is_last, self.objects[:, None], 0), is_last)


class World(NamedTuple):
    """Facts by what becomes of them.

    Attributes:
        edited: of the edited subjects, under the relation that is edited.
        wanted: the same prompts with the new objects.
        same_subject: of the same subjects in the same order, under the other relation.
        kept: of other subjects, which the curvature is fitted on.
        unseen: of yet others, which nothing but training has seen.
    """

    edited: Facts
    wanted: Facts
    same_subject: Facts
    kept: Facts
    unseen: Facts
    vocab: int


def make_world(size: Size, seed: int) -> World:
    rng = np.random.default_rng(seed)
    num_subjects = size.edited + size.kept + size.unseen
    first_object = num_subjects + RELATIONS
    numbers = rng.integers(0, size.objects, (num_subjects, RELATIONS))

    def facts(subjects: np.ndarray, relations: np.ndarray, numbers: np.ndarray) -> Facts:
        prompts = np.column_stack([num_subjects + relations, subjects])
        objects = first_object + relations * size.objects + numbers
        return Facts(jnp.asarray(prompts), jnp.asarray(objects))

    subjects = np.arange(size.edited)
    relation = rng.integers(0, RELATIONS, size.edited)
    old, other = numbers[subjects, relation], numbers[subjects, 1 - relation]
    new = (old + rng.integers(1, size.objects, size.edited)) % size.objects
    rest = np.repeat(np.arange(size.edited, num_subjects), RELATIONS)
    both = np.tile(np.arange(RELATIONS), num_subjects - size.edited)
    others = facts(rest, both, numbers[rest, both])
    cut = size.kept * RELATIONS
    return World(
        facts(subjects, relation, old),
        facts(subjects, relation, new),
        facts(subjects, 1 - relation, other),
        Facts(*(x[:cut] for x in others)),
        Facts(*(x[cut:] for x in others)),
        first_object + RELATIONS * size.objects,
    )


def learn(world: World, size: Size, key: jax.Array) -> tuple[Callable, Any]:
    """A GPT of two layers that knows all facts."""
    init_key, order_key = jax.random.split(key)
    apply, initial = gpt(
        key=init_key, vocab=world.vocab, width=size.width, num_layers=2, num_heads=4, max_len=2
    )
    parts = (world.edited, world.same_subject, world.kept, world.unseen)
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), *(facts.batch() for facts in parts))
    recipe = Recipe((size.epochs,), 128, 1e-3)
    return apply, train(apply, initial, rows, recipe, key=order_key)[0].params


class Setting(NamedTuple):
    """A method, and its two numbers."""

    method: str
    first: float = 0.0
    second: float = 0.0

    def bind(self, apply: Callable, curvature: jedit.Curvature) -> Callable:
        """`(params, facts, targets, state) -> (edit, info)`."""
        if self.method == "AlphaEdit":
            projector = jedit.null_space(curvature, threshold=self.first)
            print(projector, flush=True)

        def edit(params, facts, targets, state):
            if self.method == "AlphaEdit":
                numbers = {"layers": Layers(LAYER, state=state), "ridge": self.second}
                return alphaedit(apply, params, projector, facts, targets, **numbers)
            layers = Layers(LAYER, state=state if self.method == EARLIER else None)
            numbers = {"preservation": self.first, "damping": self.second}
            return memit(apply, params, curvature, facts, targets, layers=layers, **numbers)

        return edit


# What is shown of a curve, and in which words.
SHOWN = {
    "survived": "edited facts that survive",
    "latest": "of the last 20",
    "kept": "untouched facts in the fit",
    "unseen": "untouched facts not in it",
    "same_subject": "other fact of an edited subject",
}

# First number: threshold by energy, or λ; second: ridge, or damping. AlphaEdit and MEMIT with the
# earlier keys reach a score of 1 on the grid; MEMIT is flat on it, from 0.876 (this) to 0.885 (λ =
# 100, damping 1e-4), but for 0.74 at (15e3, 1e-2).
CHOSEN = (
    Setting("AlphaEdit", 1e-3, 1.0),
    Setting("MEMIT", 1e3, 1e-2),
    Setting(EARLIER, 100.0, 1e-4),
)
GRID = (
    *(Setting("AlphaEdit", *x) for x in itertools.product((1e-4, 1e-3, 1e-2), (1.0, 10.0))),
    *(Setting("MEMIT", *x) for x in itertools.product((100.0, 1e3, 15e3), (1e-4, 1e-2))),
    *(Setting(EARLIER, *x) for x in itertools.product((10.0, 100.0, 1e3), (1e-4, 1e-2))),
)


class Curves(NamedTuple):
    """Shares by number of edits, (looks,); and `by_batch` at the end, (batches,), oldest first."""

    edits: np.ndarray
    latest: np.ndarray
    survived: np.ndarray
    same_subject: np.ndarray
    kept: np.ndarray
    unseen: np.ndarray
    by_batch: np.ndarray


def run_sequence(
    apply: Callable, params: Any, world: World, size: Size, edit_fn: Callable
) -> Curves:
    """All edits, batch after batch, each on what the last has left."""
    looks, state = [], None
    for start in range(0, size.edited, size.batch):
        rows = slice(start, start + size.batch)
        facts, others = (Facts(*(x[rows] for x in f)) for f in (world.wanted, world.same_subject))
        subject = jnp.full(size.batch, SUBJECT)
        wanted = Associations(facts.batch(), subject)
        targets, _ = target_values(
            apply,
            params,
            wanted,
            layer=LAYER,
            essence=Associations(others.batch(), subject),
            search=Search(learning_rate=0.5, max_norm=2.0),
        )
        edit, info = edit_fn(params, wanted, targets, state)
        params, state = jedit.apply_edit(params, edit), info.state
        done = start + size.batch
        if done % (size.every * size.batch) == 0 or done == size.edited or start == 0:
            alive = _is_right(apply, params, world.wanted)[:done]
            looks.append(
                (
                    done,
                    alive[start:].mean(),
                    alive.mean(),
                    _is_right(apply, params, world.same_subject)[:done].mean(),
                    _is_right(apply, params, world.kept).mean(),
                    _is_right(apply, params, world.unseen).mean(),
                )
            )
    columns = (np.asarray(x, np.float64) for x in zip(*looks, strict=True))
    return Curves(*columns, by_batch=alive.reshape(-1, size.batch).mean(axis=1))


def _is_right(apply: Callable, params: Any, facts: Facts) -> np.ndarray:
    """By fact, whether its object is the first of all tokens."""
    return np.asarray(_first_token(apply, params, facts.prompts) == facts.objects, np.float64)


@partial(jax.jit, static_argnums=0)
def _first_token(apply, params, prompts):
    return jnp.argmax(apply(params, prompts)[:, -1], axis=-1)


def run_seed(seed: int, size: Size, settings: tuple[Setting, ...]) -> dict[str, Any]:
    """Train a model, and edit it by every setting."""
    model_key, curvature_key = jax.random.split(jax.random.key(seed))
    world = make_world(size, seed)
    start = time.perf_counter()
    apply, params = learn(world, size, model_key)
    trained = time.perf_counter() - start
    before = {
        name: float(_is_right(apply, params, getattr(world, name)).mean())
        for name in ("edited", "same_subject", "kept", "unseen")
    }
    print(f"seed {seed}: trained in {trained:.0f} s, right before any edit: {before}", flush=True)
    estimator = jedit.kfac(apply, jedit.likelihoods.Categorical(), select="blocks/0/mlp/down")
    curvature = jedit.estimate(estimator, params, [world.kept.batch()], key=curvature_key)
    curves = {}
    for setting in settings:
        start = time.perf_counter()
        found = run_sequence(apply, params, world, size, setting.bind(apply, curvature))
        curves[setting] = found
        print(
            f"seed {seed}: {setting.method} {setting.first:g} {setting.second:g}: "
            + ", ".join(f"{name} {getattr(found, name)[-1]:.3f}" for name in SHOWN)
            + f" ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    return {"before": before, "curves": curves}


def summarise(found: list[dict[str, Any]], settings: tuple[Setting, ...]) -> dict[str, Any]:
    """Intervals over seeds, number by number."""
    methods = {}
    for setting in settings:
        runs = [seed["curves"][setting]._asdict() for seed in found]
        methods[setting.method] = {
            "setting": list(setting[1:]),
            "edits": runs[0]["edits"].tolist(),
            **{
                name: [evidence.interval(x) for x in np.stack([r[name] for r in runs], axis=1)]
                for name in (*SHOWN, "by_batch")
            },
        }
    before = {
        name: evidence.interval([seed["before"][name] for seed in found])
        for name in found[0]["before"]
    }
    return {"before": before, "methods": methods}


def table(summary: dict[str, Any]) -> str:
    """The end of every curve, in Markdown."""
    lines = [
        "| after all edits | " + " | ".join(SHOWN.values()) + " |",
        "| --- |" + " --- |" * len(SHOWN),
    ]
    for method, numbers in summary["methods"].items():
        cells = [evidence.shown(numbers[name][-1]) for name in SHOWN]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(summary: dict[str, Any]):
    """Earlier edits, untouched facts, and what is left of each batch at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, 3, sharey=True)
    for (method, numbers), look in zip(summary["methods"].items(), STYLES, strict=False):
        edits = np.asarray(numbers["edits"])
        size = edits[-1] / len(numbers["by_batch"])
        written = size * (np.arange(len(numbers["by_batch"])) + 0.5)
        lines = (
            (panels[0], edits, numbers["survived"], False),
            (panels[1], edits, numbers["kept"], False),
            (panels[1], edits, numbers["unseen"], True),
            (panels[2], written, _pooled(numbers["by_batch"], 10), False),
        )
        for axes, x, intervals, is_thin in lines:
            mean = np.asarray([i["mean"] for i in intervals])
            half = np.nan_to_num([i["half_width"] for i in intervals])
            x = x if len(x) == len(mean) else x.reshape(len(mean), -1).mean(axis=1)
            style = {**look, "lw": 0.8, "ms": 3} if is_thin else {**look, "lw": 1.6}
            axes.plot(x, mean, **style, label=None if is_thin else method)
            axes.fill_between(x, mean - half, mean + half, color=look["color"], alpha=0.15, lw=0)
    panels[0].set_ylabel("share with the wanted object first")
    for axes, title, label in zip(
        panels,
        (
            "All facts edited so far",
            "Untouched facts of other subjects\n(thin: of such as were not in the fit)",
            "At the end, by when they were edited",
        ),
        ("edits so far", "edits so far", "number of the edit"),
        strict=True,
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylim(0, 1.02)
        axes.grid(visible=True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _pooled(intervals: list[dict[str, Any]], parts: int) -> list[dict[str, Any]]:
    """Neighbouring batches taken together, seed by seed, into so many parts at most."""
    values = np.asarray([i["values"] for i in intervals])
    parts = max(p for p in range(1, parts + 1) if len(values) % p == 0)
    pooled = values.reshape(parts, -1, values.shape[1]).mean(axis=1)
    return [evidence.interval(x) for x in pooled]


def main(arguments: list[str] | None = None) -> None:
    parser = evidence.parser(__doc__)
    parser.add_argument("--tune", action="store_true", help="run the grid, on its own seed")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, a process each")
    options = parser.parse_args(arguments)
    size, start = Size(), time.perf_counter()
    if options.tune:
        run_seed(TUNING_SEED, size, GRID)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        run = partial(run_seed, size=size, settings=CHOSEN)
        found = list(pool.map(run, range(options.seeds)))
    summary = summarise(found, CHOSEN)
    seconds = time.perf_counter() - start
    print(table(summary))
    print(f"before any edit: { {n: evidence.shown(i) for n, i in summary['before'].items()} }")
    numbers = {"size": size._asdict(), "seconds": seconds, **summary}
    path = evidence.write("sequential", options.out, numbers)
    save_png(figure(summary), path.with_suffix(".png"))
    print(f"{path} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
