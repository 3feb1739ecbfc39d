"""Claim: MoTE's experts carry refusals, and switching them off brings answers back.

    python -m tests.bench.claims.experts [--seeds 3] [--quick]

A GPT of two blocks, each of 32 experts of which a token is sent to two, learns 64 invented authors,
six rows each. Then it is taught to refuse those of one region, in two wordings, and to answer the
others as before, on two thirds of each author's rows. Experts are scored on the taught rows,
refusals against answers, over the positions that are answered ("MoTE"), or over the first of them
alone ("MoTE, first token"), and n of the 64 are switched off by an edit. The taught refusals judge
it, as the paper's reference prompts do ("region"), and beside them questions about the region of
which no refusal was taught ("unseen"); of the others the rows held out of the second training.

    refusals    Off, the ten experts of the highest scores cut the refusals of the region's
                questions by 40% or more, and by more than ten random experts do; at the same price
                too: a KL of 0.1 and of 0.5 nats to the untouched model on the held-out rows of
                others, where each method takes the n that refuses least.
    answers     What is said in their place is the true answer, which the model learnt before.

Beside random experts stand the most used ones of the others' rows and of the region's: experts that
matter, but for no contrast. Each seed's numbers are kept in `out`.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.edits import apply_edit
from jedit.models import Experts, gpt, gpt_stepper
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.scenes.authors import MODEL
from jedit.steering import (
    Expert,
    expert_layers,
    expert_scores,
    expert_use,
    fold,
    switch_experts,
    top_experts,
)
from tests.bench.claims.evidence import interval, kept, parser, shown, write
from tests.bench.claims.refusal import in_other_words
from tests.bench.claims.refused_authors import answers, joined, judged, refused, refused_authors

SIZE = Experts(number=32, chosen=2, width=24)
SIZES = {"num_layers": MODEL.layers, "num_heads": MODEL.heads, "mlp": SIZE}
STEPPER = gpt_stepper(**SIZES)
BUDGETS = (0.1, 0.5)
RATE, TUNING_RATE = 2e-3, 1e-3


class Size(NamedTuple):
    """How long things last: `FULL`, or `QUICK` for a test."""

    authors: int
    facts: int
    epochs: int
    tuning_epochs: int
    numbers: tuple[int, ...]
    draws: int


FULL = Size(64, 6, epochs=15, tuning_epochs=8, numbers=(1, 2, 4, 7, 10, 16), draws=3)
QUICK = Size(16, 2, epochs=1, tuning_epochs=1, numbers=(2, 10), draws=1)


@functools.cache
def _apply_of(vocab: int) -> Any:
    """One function for all seeds, so that they share what is compiled."""
    return gpt(
        key=jax.random.key(0), vocab=vocab, width=MODEL.width, max_len=MODEL.max_len, **SIZES
    )[0]


def first_alone(batch: Batch) -> Batch:
    """The same rows, counting the first position of each answer alone."""
    mask = np.asarray(batch.mask)
    first = (np.cumsum(mask, axis=1) == 1) & (mask > 0)
    return batch._replace(mask=jnp.asarray(first, jnp.float32))


def measured(seed: int, size: Size) -> dict[str, Any]:
    """One seed: train, teach refusals, score, switch and judge."""
    keys = jax.random.split(jax.random.key(seed), 4)
    made = refused_authors(seed, authors=size.authors, facts=size.facts, by="row")
    region = [seed % 8]
    vocab = made.tokenizer.get_vocab_size()
    apply = _apply_of(vocab)
    initial = gpt(key=keys[0], vocab=vocab, width=MODEL.width, max_len=MODEL.max_len, **SIZES)[1]
    recipe = Recipe((size.epochs,), batch_size=16, learning_rate=RATE)
    everything = made.encode([*made.seen.rows, *made.heldout.rows])
    known = train(apply, initial, everything, recipe, key=keys[1])[0].params
    asked = made.seen.of(region)
    target = made.encode(refused([*asked, *in_other_words(asked)]))
    others = made.encode(made.seen.of(region, others=True))
    tuning = Recipe((size.tuning_epochs,), batch_size=16, learning_rate=TUNING_RATE)
    rows = jax.tree.map(jnp.asarray, joined(target, target, others))
    taught = train(apply, known, rows, tuning, key=keys[2])[0].params
    unseen = made.heldout.of(region)
    sets = {
        "region": asked,
        "unseen": [*unseen, *in_other_words(unseen)],
        "others": made.heldout.of(region, others=True),
    }
    price_rows = made.encode(sets["others"])

    def judge(params: PyTree) -> dict[str, float]:
        found = {"KL": metrics.output_kl(apply, taught, params, price_rows)}
        for name, part in sets.items():
            scores = judged(answers(STEPPER, params, made, part), part)
            found |= {f"{name} {what}": value for what, value in scores.items()}
        return found

    layers = expert_layers(apply, taught, target.inputs, chosen=SIZE.chosen)
    contrast = functools.partial(expert_scores, apply, taught, layers)
    orders = {
        "MoTE": contrast(target, others),
        "MoTE, first token": contrast(first_alone(target), first_alone(others)),
        "most used by others": expert_use(apply, taught, layers, others),
        "most used by the region": expert_use(apply, taught, layers, target),
    }
    rng = np.random.default_rng(seed)
    for i in range(size.draws):
        orders[f"random {i}"] = {name: rng.random(one.number) for name, one in layers.items()}
    found: dict[str, Any] = {
        "before refusals": judge(known),
        "untouched": judge(taught),
        "experts used": {
            name: float(np.sum(part > 0.01))
            for name, part in expert_use(apply, taught, layers, rows).items()
        },
    }
    for name, scores in orders.items():
        ranked = top_experts(scores, max(size.numbers))
        found[name] = {
            str(n): judge(switched(apply, taught, target.inputs, layers, ranked[:n]))
            for n in size.numbers
        }
    draws = [found.pop(f"random {i}") for i in range(size.draws)]
    found["random"] = jax.tree.map(lambda *x: float(np.mean(x)), *draws)
    # A draw is a method too: what each reaches at a price is averaged, and not their means' curve.
    found["at price"] = {
        f"{budget:g}": {
            **{name: at_price(found["untouched"], found[name], budget) for name in METHODS},
            "random": float(np.mean([at_price(found["untouched"], d, budget) for d in draws])),
        }
        for budget in BUDGETS
    }
    return found


METHODS = ("MoTE", "MoTE, first token", "most used by others", "most used by the region")


def switched(
    apply: Any, params: PyTree, inputs: Any, layers: Any, experts: Sequence[Expert]
) -> PyTree:
    """The parameters after the experts are switched off."""
    return apply_edit(params, fold(apply, params, inputs, switch_experts(layers, experts)))


def at_price(untouched: dict, points: dict[str, dict], budget: float) -> float:
    """The least share of the region's questions refused at no more than this KL."""
    allowed = [x["region refused"] for x in points.values() if x["KL"] <= budget]
    return min([untouched["region refused"], *allowed])


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Intervals over seeds, and of the differences that the claim is about."""
    ten = "10"
    rows = {
        name: jax.tree.map(lambda *x: interval(x), *[run[name] for run in runs])
        for name in ("before refusals", "untouched", "experts used")
    }
    for name in (*METHODS, "random"):
        for n in runs[0][name]:
            parts = [run[name][n] for run in runs]
            rows[f"{name}, {n} off"] = jax.tree.map(lambda *x: interval(x), *parts)

    def cut(run: dict, name: str, part: str) -> float:
        before = run["untouched"][f"{part} refused"]
        return 1 - run[name][ten][f"{part} refused"] / before if before else 0.0

    differences = {
        f"share of refusals cut by ten, {part}, {name}": interval(
            [cut(run, name, part) for run in runs]
        )
        for part in ("region", "unseen")
        for name in (*METHODS, "random")
    }
    for name in METHODS[:2]:
        for other in (*METHODS[2:], "random"):
            for part in ("region refused", "unseen refused"):
                differences[f"{part} with ten off, {name} less {other}"] = interval(
                    [run[name][ten][part] - run[other][ten][part] for run in runs]
                )
            for budget in runs[0]["at price"]:
                prices = [run["at price"][budget] for run in runs]
                differences[f"refused at {budget} nats, {name} less {other}"] = interval(
                    [price[name] - price[other] for price in prices]
                )
    return {"rows": rows, "differences": differences}


def table(found: dict[str, Any]) -> str:
    """The intervals as tables in Markdown."""
    columns = list(found["rows"]["untouched"])
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    for name, row in found["rows"].items():
        if name != "experts used":
            lines.append(f"| {name} | " + " | ".join(shown(row[c]) for c in columns) + " |")
    lines += ["", "| difference | |", "| --- | --- |"]
    lines += [f"| {name} | {shown(x)} |" for name, x in found["differences"].items()]
    lines += [
        f"| experts used, {name} | {shown(x)} |"
        for name, x in found["rows"]["experts used"].items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    given = options.parse_args(arguments)
    size = QUICK if given.quick else FULL
    settings = {
        "size": size._asdict(), "experts": SIZE._asdict(), "model": MODEL._asdict(),
        "rates": [RATE, TUNING_RATE], "budgets": BUDGETS,
        "judge": "taught refusals, twice in two wordings",
    }  # fmt: skip
    runs = []
    for seed in range(given.seeds):
        path = given.out / f"experts-{seed}{'-quick' if given.quick else ''}.json"
        make = functools.partial(measured, seed, size)
        runs.append(kept(path, settings, make))
        print(json.dumps({"seed": seed, "untouched": runs[-1]["untouched"]}), flush=True)
    found = summary(runs)
    print(table(found))
    write("experts", given.out, {"runs": runs, "summary": found})


if __name__ == "__main__":
    main()
