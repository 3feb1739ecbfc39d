"""Claim: an NMDA-inspired activation changes what an edit erases, and what relearning brings back.

    python -m tests.bench.claims.nmda [--seeds 3] [--quick]

A small GPT learns invented authors by heart, once for each activation of its perceptrons: GELU, and
NMDA's at α = 1 (SiLU) and α = 10, which its paper found best.  Two authors are forgotten by K-FADE
and by natural steps (`jedit.forget`, the budget alone), at a true KL of 0.1 nats on retain rows, of
which the half that no edit saw is reported.  Measured:

    before      mean NLL of the forget answers, untouched, nats per token
    rise        what the edit adds to it
    heldout KL  nats per output, on retain rows that no edit sees
    relearned   NLL of the half of the forget rows not taught, after 20 updates on the other half,
                less that of the untouched model taught alike: what lasts

Decided by paired differences of `rise` and of `relearned`, each activation less GELU.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PyTree

import jedit
from jedit import metrics
from jedit.attacks import relearn
from jedit.core.batch import Batch
from jedit.data import encode_rows, generate_authors, text_of, train_tokenizer
from jedit.methods import kfade
from jedit.models import NMDA, gpt
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.scenes.question_answer import SELECT
from tests.bench.claims.evidence import interval, kept, parser, shown, write

NAME, BUDGET, UPDATES, VOCAB = "nmda", 0.1, 20, 600
APPLIES: dict[str, Callable] = {}
ACTIVATIONS: dict[str, Callable] = {
    "GELU": jax.nn.gelu,
    "NMDA, alpha 1": NMDA(1.0),
    "NMDA, alpha 10": NMDA(10.0),
}
COLUMNS = ("before", "rise", "heldout KL", "relearned")
EDITS = ("K-FADE", "natural steps")


class Size(NamedTuple):
    """How large a scene is."""

    authors: int
    facts: int
    width: int
    epochs: int
    edits: tuple[str, ...] = EDITS


WHOLE, QUICK = Size(16, 8, 64, 20), Size(4, 3, 8, 1, EDITS[:1])


def measured(seed: int, size: Size) -> dict[str, Any]:
    """Train, edit and attack one model for each activation."""
    rows = generate_authors(seed, size.authors, size.facts)
    names = list(dict.fromkeys(row.fields["author"] for row in rows))
    tokenizer = train_tokenizer(text_of(rows), VOCAB)
    encode = lambda rows: encode_rows(tokenizer, rows, 64, truncate=True)  # noqa: E731
    forget = [row for row in rows if row.fields["author"] in names[-2:]]
    others = [row for row in rows if row.fields["author"] not in names[-2:]]
    first, fitting, order, label, edit_key, attack = jax.random.split(jax.random.key(seed), 6)
    shuffled = [others[i] for i in np.asarray(jax.random.permutation(order, len(others)))]
    cut = round(0.7 * len(others))
    retain, heldout = encode(shuffled[:cut]), encode(shuffled[cut:])
    taught, asked = (encode(forget[s]) for s in (slice(0, None, 2), slice(1, None, 2)))
    forget_rows = encode(forget)
    found: dict[str, Any] = {}
    for name, activation in ACTIVATIONS.items():
        made = {"vocab": VOCAB, "width": size.width, "num_layers": 2, "num_heads": 4, "max_len": 64}
        fresh, initial = gpt(key=jax.random.clone(first), **made, mlp=activation)
        apply = APPLIES.setdefault(name, fresh)  # one function, so that seeds share what compiles
        params = train(
            apply,
            initial,
            encode(rows),
            Recipe((size.epochs,), 16, 3e-3),
            key=jax.random.clone(fitting),
        )[-1].params
        estimator = jedit.kfac(apply, jedit.likelihoods.Categorical(), select=SELECT)
        curvature = jedit.estimate(estimator, params, [retain], key=jax.random.clone(label))
        edits = {"K-FADE": kfade(apply, params, curvature, forget_rows, retain, budget=BUDGET)[0]}
        if "natural steps" in size.edits:
            edits["natural steps"], _ = jedit.forget(
                apply, params, forget_rows, retain, budget=BUDGET, key=jax.random.clone(edit_key)
            )

        def loss(params: PyTree, rows: Batch, apply=apply) -> float:
            return float(np.mean(metrics.answer_nll_per_row(apply, params, rows)))

        def back(params: PyTree, apply=apply, loss=loss) -> float:
            return float(
                relearn(
                    apply,
                    params,
                    taught,
                    optimizer=optax.adam(1e-3),
                    looks=(UPDATES,),
                    measure=lambda p: loss(p, asked),
                    key=jax.random.clone(attack),
                ).values[-1]
            )

        before, floor = loss(params, forget_rows), back(params)
        for kind, edit in edits.items():
            edited = jedit.apply_edit(params, edit)
            found[f"{kind}, {name}"] = {
                "before": before,
                "rise": loss(edited, forget_rows) - before,
                "heldout KL": float(metrics.output_kl(apply, params, edited, heldout)),
                "relearned": back(edited) - floor,
            }
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    given = options.parse_args(arguments)
    size = QUICK if given.quick else WHOLE
    settings = {"size": size._asdict(), "budget": BUDGET, "updates": UPDATES}
    runs = []
    for seed in range(given.seeds):
        path = given.out / f"{NAME}-{seed}.json"
        record = kept(path, settings, lambda seed=seed: measured(seed, size))
        runs.append({name: row for name, row in record.items() if name != "settings"})
        print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    table = {
        name: {c: interval([run[name][c] for run in runs]) for c in COLUMNS} for name in runs[0]
    }
    print("| | " + " | ".join(COLUMNS) + " |\n" + "| --- " * 5 + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(shown(row[c]) for c in COLUMNS) + " |")
    differences: dict[str, Any] = {}
    for kind in size.edits:
        for name in list(ACTIVATIONS)[1:]:
            for column in ("rise", "relearned"):
                pairs = [
                    run[f"{kind}, {name}"][column] - run[f"{kind}, GELU"][column] for run in runs
                ]
                differences[f"{kind}, {name} less GELU, {column}"] = interval(pairs)
    for name, found in differences.items():
        print(f"{name}: {shown(found)}")
    write(NAME, given.out, {"runs": runs, "table": table, "differences": differences})


if __name__ == "__main__":
    main()
