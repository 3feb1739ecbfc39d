"""Claim: who tunes his attack gets the rows back. How many rows and updates does it take?

    python -m tests.bench.claims.relearning --data DIR [--first 1 --seeds 3] [--strict] [--model M]

`jedit.forget`'s model of each seed, and the retrained one, under `attacks.relearning_curve`: one
row, a sixth and a third of the forget rows taught; 5, 20 and 80 updates; each attacker with the
best of his rates at each point. By attacker:

    Adam       all parameters at 3e-4 or 1e-3
    adapters   LoRA of rank 8 on every matrix, at 1e-3 or 1e-2
    knowing    natural steps in the untouched model's metric: predicted KL 1e-4 or 1e-3 a step
    benign     Adam on rows of world facts in place of the forget rows

The number is the mean probability of the forget answers that are never taught.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from jedit import Curvature, metrics
from jedit.attacks import Attacker, relearn, relearning_curve
from jedit.core.batch import Batch
from jedit.models import with_lora
from jedit.recipes.tofu.attacks import lessons_of, probability_of
from jedit.recipes.tofu.presets import PRESETS
from jedit.recipes.tofu.run import read_sets
from jedit.transforms import natural_steps
from tests.bench.claims.evidence import interval, shown, write
from tests.bench.claims.grids import PRODUCTS, Setup
from tests.bench.claims.natural import tofu_parser

LOOKS, SHARES = (5, 20, 80), (0.0, 1 / 6, 1 / 3)
Values = dict[str, dict[str, dict[str, float]]]  # attacker, rows and updates, model


def _lora(rate: float) -> optax.GradientTransformation:
    optimizers = {"lora": optax.adam(rate), "base": optax.set_to_zero()}
    return optax.multi_transform(optimizers, {"lora": "lora", "base": "base"})


def curves(setup: Setup, edited: PyTree, curvature: Curvature) -> Values:
    """Attack the edited and the retrained model in every way."""
    apply, rows, retrained = setup.model.apply, setup.task.forget, setup.task.retrained
    key, lora_key = jax.random.split(jax.random.fold_in(jax.random.key(setup.seed), 5))
    adapted = with_lora(apply, edited, rows.inputs, rank=8, key=lora_key)

    def of(
        attacker: Attacker, apply: Callable, first: PyTree, second: PyTree
    ) -> dict[str, dict[str, float]]:
        def known(params: PyTree, asked: Batch) -> float:
            loss = metrics.answer_nll_per_row(apply, params, asked)
            return float(np.mean(metrics.answer_probability(loss)))

        curve = relearning_curve(
            apply, first, second, rows, attacker=attacker, measure=known, key=jax.random.clone(key)
        )
        both = {"edited": curve.edited, "retrained": curve.retrained}
        return {
            f"{taught} rows, {steps} updates": {n: float(v[i, j]) for n, v in both.items()}
            for i, taught in enumerate(curve.taught)
            for j, steps in enumerate(curve.steps)
            if steps
        }

    knowing = lambda price: natural_steps(curvature, predicted_kl=price)  # noqa: E731
    return {
        "Adam": of(Attacker(optax.adam, (3e-4, 1e-3), LOOKS, SHARES), apply, edited, retrained),
        "adapters": of(
            Attacker(_lora, (1e-3, 1e-2), LOOKS, SHARES),
            adapted.apply,
            adapted.params,
            adapted.params | {"base": retrained},
        ),
        "knowing": of(Attacker(knowing, (1e-4, 1e-3), LOOKS, (1 / 6,)), apply, edited, retrained),
        "benign": _benign(setup, edited, key),
    }


def _benign(setup: Setup, edited: PyTree, key: jax.Array) -> dict[str, dict[str, float]]:
    lessons, others = lessons_of(setup.scene.asked)
    taught = setup.model.encode([(row.question, row.answer) for row in lessons["benign"]])
    known, found = probability_of(setup.model, others), {}
    for name, params in {"edited": edited, "retrained": setup.task.retrained}.items():
        best = np.max(
            [
                relearn(
                    setup.model.apply,
                    params,
                    taught,
                    optimizer=optax.adam(rate),
                    looks=LOOKS,
                    measure=known,
                    key=jax.random.clone(key),
                ).values
                for rate in (3e-4, 1e-3)
            ],
            axis=0,
        )
        for steps, value in zip(LOOKS, best[1:], strict=True):
            where = f"{len(lessons['benign'])} rows, {steps} updates"
            found.setdefault(where, {})[name] = float(value)
    return found


def main() -> None:
    """Run the seeds and write what came out."""
    options = tofu_parser(__doc__, seeds=3)
    options.add_argument("--model", choices=PRODUCTS, default="forget", help="who is attacked")
    options.add_argument("--strict", action="store_true", help="hold six authors out of all")
    given = options.parse_args()
    sets, runs = read_sets(given.data, PRESETS["cpu"]), []
    for seed in range(given.first, given.first + given.seeds):
        setup = Setup(sets, seed, given.out, is_strict=given.strict)
        curvature = setup.material("NPO (natural)").curvature
        assert curvature is not None
        edited = setup.product(PRODUCTS[given.model])
        runs.append(curves(setup, edited, curvature))
        print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    summary: dict[str, Any] = {}
    print("| attacker | spent | edited | retrained |")
    print("| --- | --- | --- | --- |")
    for name, points in runs[0].items():
        for where in points:
            found = {
                model: interval([run[name][where][model] for run in runs])
                for model in points[where]
            }
            summary.setdefault(name, {})[where] = found
            cells = [shown(found[model]) for model in ("edited", "retrained")]
            print(f"| {name} | {where} | " + " | ".join(cells) + " |")
    write("relearning", given.out / given.model, {"runs": runs, "summary": summary})


if __name__ == "__main__":
    main()
