"""Claims: who turns attention away, or makes the known look unknown, forgets and stays fluent.

    python -m tests.bench.claims.shifting [--seeds 3] [--quick]

A small GPT learns invented authors and forgets two of them by Attention-Shifting, SAE-guided
unlearning, NPO, RMU and K-FADE, each over its grid of rates and steps.  Of each method the point is
taken that is nearest to the retrained model on the forget rows (KL), of those that cost at most 0.1
nats on retain rows.  Measured there:

    forget      mean probability of the forget answers, length-normalised
    KL          to the untouched model, on retain rows that no edit sees, nats per output
    relearned   `forget` of the rows not taught, after 20 updates on half of the forget rows
    fluency     perplexity of what the edited model answers to the forget questions (greedily), less
                the text's end, to a judge that learned other invented authors alone: it knows how
                such answers are worded, and none of the facts

The rows taught and those asked about alternate, so that both are about the same authors.

A seed that was measured is read from the folder of the numbers.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from jedit.attacks import relearn
from jedit.core.batch import Batch
from jedit.data import (
    QaRow,
    decode_answers,
    encode_rows,
    generate_authors,
    prompts_of,
    text_of,
    train_tokenizer,
)
from jedit.methods.row import Pace
from jedit.metrics import answer_nll_per_row, answer_probability
from jedit.models import greedy_decode
from jedit.recipes.comparison.compare import compare
from jedit.recipes.comparison.task import Grid, Task
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.scenes.question_answer import SELECT, Model
from tests.bench.claims.evidence import interval, kept, parser, shown, write

NAME = "shifting"
METHODS = ("Attention-Shifting", "SAE-guided", "NPO", "RMU", "K-FADE (K-FAC)")
COLUMNS = ("forget", "KL", "relearned", "fluency")
BUDGET, UPDATES, ANSWER = 0.1, 20, 24


class Size(NamedTuple):
    """How large a scene is.

    Attributes:
        authors: how many are learned, two of them to be forgotten.
        facts: questions about each.
        model: the GPT.
        recipe: its training.
        looks: numbers of steps of the methods that train.
        rates: their learning rates.
    """

    authors: int
    facts: int
    model: Model
    recipe: Recipe
    looks: tuple[int, ...]
    rates: tuple[float, ...]


WHOLE = Size(
    16, 8, Model(64, 2, 4, 600, 64), Recipe((20,), 16, 3e-3), (4, 16, 64), (3e-4, 1e-3, 3e-3)
)
QUICK = Size(4, 3, Model(8, 1, 2, 300, 64), Recipe((1,), 8, 3e-3), (1, 2), (1e-3,))


class Scene(NamedTuple):
    """A trained model, its rows, and what encodes rows for it."""

    task: Task
    forget: list[QaRow]
    encode: Callable[[list], Batch]
    tokenizer: Any
    judge: PyTree


def make_scene(seed: int, size: Size) -> Scene:
    """Train the model, and the one without the rows to forget."""
    rows = generate_authors(seed, size.authors, size.facts)
    names = list(dict.fromkeys(row.fields["author"] for row in rows))
    gone = set(names[-2:])
    forget = [row for row in rows if row.fields["author"] in gone]
    kept = [row for row in rows if row.fields["author"] not in gone]
    strangers = [
        row
        for row in generate_authors(seed + 1000, 8, size.facts)
        if row.fields["author"] not in names
    ]
    tokenizer = train_tokenizer(text_of(rows), size.model.vocab)
    encode = lambda rows: encode_rows(tokenizer, rows, size.model.max_len, truncate=True)  # noqa: E731
    keys = jax.random.split(jax.random.key(seed), 3)
    apply, initial = size.model.make(
        tokenizer.get_vocab_size(), size.model.max_len + ANSWER, key=keys[0]
    )
    original, retrained = (
        train(apply, initial, encode(part), size.recipe, key=jax.random.clone(keys[1]))[-1].params
        for part in (rows, kept)
    )
    order = np.asarray(jax.random.permutation(keys[2], len(kept)))
    cut = round(0.7 * len(kept))
    last = size.model.layers - 1
    task = Task(
        apply=apply,
        original=original,
        retrained=retrained,
        forget=encode(forget),
        retain=encode([kept[i] for i in order[:cut]]),
        heldout=encode([kept[i] for i in order[cut:]]),
        test=None,
        truth_ratio=None,
        select=SELECT,
        chunk=16,
        probe=32,
        hidden_site=f"blocks/{last}/attn/query/kernel",
        layers=tuple(f"blocks/{i}/mlp/down/kernel" for i in range(size.model.layers)),
        unknown=encode(strangers),
    )
    told = generate_authors(seed + 2000, size.authors, size.facts)
    told = encode([row for row in told if row.fields["author"] not in names])
    judge = train(apply, initial, told, size.recipe, key=jax.random.clone(keys[1]))[-1].params
    return Scene(task, forget, encode, tokenizer, judge)


def probability(task: Task, params: PyTree, rows: Batch) -> float:
    """Return the mean probability of the answers."""
    return float(np.mean(answer_probability(answer_nll_per_row(task.apply, params, rows))))


def fluency(scene: Scene, params: PyTree) -> float:
    """Return the perplexity, to the judge, of the words that these parameters answer."""
    task = scene.task
    asked = prompts_of(task.forget)
    added = greedy_decode(task.apply, params, asked.tokens, ANSWER, prompt_lengths=asked.lengths)
    said = decode_answers(scene.tokenizer, np.asarray(added))
    rows = scene.encode(
        [(row.question, text) for row, text in zip(scene.forget, said, strict=True)]
    )
    # An answer that is cut off after so many tokens does not end there.
    counted = np.asarray(rows.mask) > 0
    is_last = counted & (np.cumsum(counted, axis=1) == counted.sum(axis=1, keepdims=True))
    words = np.where(counted.sum(axis=1, keepdims=True) > 1, counted & ~is_last, counted)
    rows = rows._replace(mask=np.asarray(words, np.asarray(rows.mask).dtype))
    return float(np.exp(np.mean(answer_nll_per_row(task.apply, scene.judge, rows))))


def judged(scene: Scene, params: PyTree, kl: float, *, seed: int) -> dict[str, float]:
    """Measure one model."""
    task = scene.task
    halves = (slice(0, None, 2), slice(1, None, 2))
    taught, asked = (scene.encode(scene.forget[s]) for s in halves)
    back = relearn(
        task.apply,
        params,
        taught,
        optimizer=optax.adam(1e-3),
        looks=(UPDATES,),
        measure=lambda p: probability(task, p, asked),
        key=jax.random.key(seed),
    )
    values = probability(task, params, task.forget), kl, float(back.values[-1])
    return dict(zip(COLUMNS, (*values, fluency(scene, params)), strict=True))


def measured(seed: int, size: Size) -> dict[str, dict[str, float]]:
    """Edit by every method, and measure each at its point."""
    scene = make_scene(seed, size)
    task = scene.task
    grid = Grid(
        methods=METHODS,
        budgets=(0.03, 0.1),
        temperatures=(1.0, 4.0),
        damping=(0.1,),
        kfade_steps=(1,),
        looks=size.looks,
        batch_size=16,
        kl_budget=BUDGET,
        rates=dict.fromkeys(Pace, size.rates),
    )
    found = {
        "untouched": judged(scene, task.original, 0.0, seed=seed),
        "retrained": judged(scene, task.retrained, np.nan, seed=seed),
    }
    result, models = compare(task, grid, key=jax.random.key(seed), say=lambda *_, **__: None)
    for name in METHODS:
        best = result.best[name]
        if best is None:  # no point within the budget
            found[name] = dict.fromkeys(COLUMNS, np.nan)
            continue
        found[name] = judged(scene, models[name], best[1].heldout_kl, seed=seed)
        print(name, json.dumps(found[name]), best[0].setting, best[1].strength, flush=True)
    return found


def main() -> None:
    """Run the seeds and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    given = options.parse_args()
    runs = []
    for seed in range(given.seeds):
        path = given.out / f"{NAME}{'-quick' if given.quick else ''}-{seed}.json"
        size = QUICK if given.quick else WHOLE
        made = kept(path, size._asdict(), lambda s=seed, z=size: {"found": measured(s, z)})
        runs.append(made["found"])
        print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    summary: dict[str, Any] = {}
    print("|  | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (1 + len(COLUMNS)) + "|")
    for name in runs[0]:
        there = [run[name] for run in runs if not np.isnan(run[name]["forget"])]
        summary[name] = {c: interval([run[c] for run in there]) for c in COLUMNS}
        cells = [shown(summary[name][c]) if there else "" for c in COLUMNS]
        # A seed without a point within the budget counts in no mean.
        few = "" if len(there) == len(runs) else f" ({len(there)} of {len(runs)} seeds)"
        print(f"| {name}{few} | " + " | ".join(cells) + " |")
    write(NAME, given.out, {"runs": runs, "summary": summary})


if __name__ == "__main__":
    main()
