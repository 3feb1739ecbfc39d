"""Claims: natural steps pass TOFU's Forget Quality at the retrained model's utility; they stop by
themselves, without a retrained model; the edit lasts. The second holds so far: see natural.md.

    python -m tests.bench.claims.natural --data DIR [--seeds 5] [--field] [--steps 48 96] [--quick]
    python -m tests.bench.claims.natural --data DIR [--field] --rewind 0.3 0.2 --steps 24 \
        --predicted-kl 3e-4 --recovery 24 --batch-size 8

Each seed trains a full and a retrained model at the cpu preset, once: `out/claims` keeps them.
`--field` is the field's protocol, in which methods see all retain rows; without it six authors are
held out of everything but the judging and the price. The edit is `jedit.forget`'s: it is told the
holdout rows and no retrained model. By each model:

    quality, utility, nll, kl   Forget Quality, Model Utility, loss of the forget rows, held-out KL
    score                       mean log truth ratio of the forget rows, against answers of unseen
                                authors to the nearest question, with the name changed: 0 for whom
                                nothing is known of
    relearned, benign, 4 bits   probability of the forget answers under attack; probe: its accuracy
                                (not with --quick)
    ratio                       mean truth ratio of the forget rows

The last line is Forget Quality between the retrained models of different seeds: no method that is
judged by one of them can be expected to do better.
"""

import argparse
import dataclasses
import itertools
import json
import pickle
import re
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jedit import Edit, Forgetting, Natural, Recovery, Rewind, apply_edit, forget, metrics
from jedit.data import QaRow, batches
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.attacks import attack
from jedit.recipes.tofu.evaluation import encode_questions, truth_ratios
from jedit.recipes.tofu.models import Start, small_gpt
from jedit.recipes.tofu.presets import PRESETS
from jedit.recipes.tofu.run import Scene, Sets, compare_key, prepare, read_sets
from jedit.requests.forget import ForgetInfo
from jedit.training.rows import num_rows
from tests.bench.claims.evidence import interval, parser, shown, write

ROWS_PER_AUTHOR = 20
NAME = re.compile(r"[A-Z][\w'’-]+(?: [A-Z][\w'’.-]+)+")
ASKING = re.compile(r"^(?:What|How|Which|In|Has|Did|Are|Can|Does|Who|The|Is|Could|Have|When) ")
ATTACKS = {
    "relearned": "relearned_harmful",
    "benign": "relearned_benign",
    "4 bits": "quantized_4_bits",
    "probe": "probe_accuracy",
}


def name_of(rows: list[QaRow]) -> str:
    """The name that most of an author's rows have in them."""
    found = Counter()
    for row in rows:
        for text in {*NAME.findall(row.question), *NAME.findall(row.answer)}:
            found[ASKING.sub("", re.sub(r"['’]s?$", "", text))] += 1
    return found.most_common(1)[0][0]


def renamed(text: str, old: str, new: str) -> str:
    """The text with another name in it, first and last name by themselves too."""
    text = text.replace(old, new)
    for mine, theirs in ((old.split()[-1], new.split()[-1]), (old.split()[0], new.split()[0])):
        text = re.sub(rf"\b{re.escape(mine)}\b", theirs, text)
    return text


def other_answers(rows: list[QaRow], unseen: list[QaRow], number: int) -> list[tuple[str, str]]:
    """For each row, answers of other unseen authors to the nearest questions, with its own name."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    def named(of: list[QaRow]) -> list[tuple[QaRow, str]]:
        authors = [of[i : i + ROWS_PER_AUTHOR] for i in range(0, len(of), ROWS_PER_AUTHOR)]
        return [(row, name) for group in authors for name in [name_of(group)] for row in group]

    ours, theirs = named(rows), named(unseen)
    texts = [[renamed(row.question, name, "X") for row, name in of] for of in (ours, theirs)]
    vectorizer = TfidfVectorizer().fit([*texts[0], *texts[1]])
    near = (vectorizer.transform(texts[0]) @ vectorizer.transform(texts[1]).T).toarray()
    near[np.array([[name == other for _, other in theirs] for _, name in ours])] = -1
    return [
        (row.question, renamed(theirs[j][0].answer, theirs[j][1], name))
        for (row, name), order in zip(ours, np.argsort(-near, axis=1), strict=True)
        for j in order[:number]
    ]


class Judge:
    """What is measured of one model of a scene."""

    def __init__(self, scene: Scene, sets: Sets, seed: int, *, attacks: bool):
        self.scene, self.seed, self.task, self.attacks = scene, seed, scene.task, attacks
        model = scene.model
        self.asked = {"forget": scene.asked["forget"]} | {
            "world_facts": encode_questions(model, sets.world_facts)
        }
        self.reference = truth_ratios(model, self.task.retrained, self.asked["forget"])
        self.held = list(batches(self.task.pack(self.task.heldout), model.chunk))
        others = other_answers(sets.forget, sets.holdout, 3)
        self.others = list(batches(model.encode(others), model.chunk))

    def __call__(self, params) -> dict[str, float]:
        """Measure one model."""
        model, asked = self.scene.model, self.asked["forget"]
        own = metrics.answer_nll_per_row(model.apply, params, asked.answers)
        others = metrics.answer_nll_per_row(model.apply, params, self.others)
        ratios = truth_ratios(model, params, asked)
        found = {}
        if self.attacks:
            key = jax.random.fold_in(jax.random.key(self.seed), 3)
            found = attack(model, params, self.task, self.asked, key=key)
        return {
            "quality": metrics.forget_quality(ratios, self.reference),
            "utility": self.task.utility(params),
            "nll": float(own.mean()),
            "kl": float(metrics.output_kl(model.apply, self.task.original, params, self.held)),
            "score": float((own - others.reshape(len(own), -1).mean(axis=1)).mean()),
            "ratio": float(ratios.mean()),
            **{name: found[key] for name, key in ATTACKS.items() if key in found},
        }


def tofu_parser(doc: str | None, *, first: int = 1, seeds: int = 5) -> argparse.ArgumentParser:
    """The options of every claim on TOFU."""
    options = parser(doc, seeds=seeds)
    options.add_argument("--data", required=True, help="TOFU's folder, or its name on the hub")
    options.add_argument("--first", type=int, default=first, help="the first seed")
    return options


def beginning(sets: Sets, seed: int) -> Start:
    """What the training of a seed's models begins with."""
    size = PRESETS["cpu"].model
    assert isinstance(size, Model)
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return small_gpt([*sets.forget, *sets.kept, *sets.general], size, "float32", key=key)


def scene_of(sets: Sets, seed: int, out: Path) -> tuple[Scene, dict[str, float]]:
    """The scene of a seed, its models trained or read, with the seconds of the trainings."""
    preset, path = PRESETS["cpu"], out / f"natural-models-{seed}.pickle"
    say = lambda text, *_, **__: print(f"seed {seed}: {text}", file=sys.stderr)  # noqa: E731
    if not path.exists():
        scene = prepare(sets, preset, seed=seed, say=say)
        seconds = {name: trained.seconds for name, trained in scene.training.items()}
        both = jax.device_get((scene.task.original, scene.task.retrained))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps((*both, seconds)))
        return scene, seconds
    original, retrained, seconds = pickle.loads(path.read_bytes())
    begin = beginning(sets, seed)
    params, other = (jax.tree.map(jnp.asarray, tree) for tree in (original, retrained))
    begin = begin._replace(params=params, retrained=other)
    return prepare(sets, preset, seed=seed, say=say, begin=begin), seconds


def rewinding(scene: Scene, sets: Sets, seed: int, share: float, part: float) -> Rewind:
    """A share of the way back, and on by a part of retraining's steps."""
    task, recipe = scene.task, PRESETS["cpu"].recipe
    rows = [(row.question, row.answer) for row in (*sets.kept, *sets.general)]
    assert task.pack is not None
    epoch = num_rows(task.pack(scene.model.encode(rows))) // recipe.batch_size
    start = beginning(sets, seed).params
    steps = round(part * recipe.epochs[0] * epoch)
    return Rewind(start, 2 * recipe.learning_rate, steps, share=share)


def product(
    scene: Scene,
    sets: Sets,
    seed: int,
    *,
    is_strict: bool,
    method: Natural = Natural(batch_size=8),  # noqa: B008 - frozen
    steps: int = 48,
    is_blind: bool = False,
) -> tuple[Edit, ForgetInfo]:
    """`forget` as a user calls it, with unseen rows, unless blind, and no retrained model.

    A rewind loses what no row holds, so that its retain rows have real authors and world facts.
    """
    task, model = scene.task, scene.model
    kept = sets.seen if is_strict else sets.kept
    seen, unseen, heldout = (
        model.encode([(row.question, row.answer) for row in rows])
        for rows in (
            kept if method.rewind is None else [*kept, *sets.general],
            sets.holdout,
            sets.heldout[:32],
        )
    )
    assert task.pack is not None  # two thirds of what is encoded is padding
    how = Forgetting(
        dataclasses.replace(method, select=task.select), steps=steps, every=8, heldout=heldout
    )
    return forget(
        task.apply, task.original, task.forget, task.pack(seen),
        unseen=None if is_blind else unseen, key=compare_key(seed), how=how,
    )  # fmt: skip


def main() -> None:
    """Run the seeds and write what came out."""
    options = tofu_parser(__doc__, first=0)
    options.add_argument("--field", action="store_true", help="methods see all retain rows")
    options.add_argument("--steps", type=int, nargs="+", default=[48, 96])
    options.add_argument("--batch-size", type=int, default=16, help="of the natural steps")
    options.add_argument("--quick", action="store_true", help="no attacks")
    options.add_argument("--recovery", type=int, default=Recovery().steps, help="its steps, or 0")
    options.add_argument(
        "--rewind", type=float, nargs=2, help="share of the way, part of the steps"
    )
    options.add_argument("--blind", action="store_true", help="no unseen rows are given")
    options.add_argument("--predicted-kl", type=float, nargs="+", default=[1e-4])
    given = options.parse_args()
    recovery = Recovery(given.recovery) if given.recovery else None
    sets = read_sets(given.data, PRESETS["cpu"])
    runs, references = [], []
    for seed in range(given.first, given.first + given.seeds):
        scene, seconds = scene_of(sets, seed, given.out)
        judge = Judge(scene, sets, seed, attacks=not given.quick)
        task = scene.task
        references.append(judge.reference)
        run = {"retrained": judge(task.retrained) | {"seconds": seconds["retrain"]}}
        run["untouched"] = judge(task.original)
        for steps, price in itertools.product(given.steps, given.predicted_kl):
            start = time.perf_counter()
            rewind = rewinding(scene, sets, seed, *given.rewind) if given.rewind else None
            method = Natural(
                predicted_kl=price, batch_size=given.batch_size, recovery=recovery, rewind=rewind
            )
            edit, info = product(
                scene, sets, seed, is_strict=not given.field, method=method, steps=steps,
                is_blind=given.blind,
            )  # fmt: skip
            taken = time.perf_counter() - start
            row = judge(apply_edit(task.original, edit))
            row |= {"seconds": taken, "steps": info.steps, "done": float(info.is_done.mean())}
            run[f"{price:g} a step, {steps} steps"] = row
        print(json.dumps({"seed": seed, **run}), file=sys.stderr, flush=True)
        runs.append(run)
    columns = [*run["untouched"], "seconds"]
    print("|  | " + " | ".join(columns) + " |")
    print("| --- " * (1 + len(columns)) + "|")
    summary = {}
    for name in runs[0]:
        found = {c: [r[name][c] for r in runs if c in r[name]] for c in columns}
        summary[name] = {c: interval(values) for c, values in found.items() if values}
        cells = [shown(summary[name][c]) if c in summary[name] else "" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")
    exact = [
        metrics.forget_quality(first, second)
        for first, second in itertools.combinations(references, 2)
    ]
    print("retrained models among themselves:", np.round(np.sort(exact), 3))
    write(
        f"natural-{'field' if given.field else 'strict'}{'-rewound' if given.rewind else ''}",
        given.out,
        {"runs": runs, "summary": summary, "retrained": exact},
    )


if __name__ == "__main__":
    main()
