"""Claims: RepSelect lasts 4 to 50 times better; what relearning takes back lies in top components.

    python -m tests.bench.claims.repselect [--seeds 3] [--quick]

A GPT of the demo's size knows twenty invented authors, of whom three are to be forgotten. Every
method runs at two or three rates and is looked at every second of 16 steps. Where its KL on retain
rows that it has not seen passes 0.1, the model is taken for which it is 0.1, on the line from the
look before to this one; of the rates, the one that has forgotten most. A method that never gets
there stands with what it reached. Each is attacked: every sixth forget row is taught for 20 updates
of Adam, at the better of two rates, and the others are asked.

    before, after   mean NLL of the forget answers that are never taught, before the attack and
                    after it
    lasting         how much higher it is after than that of the untouched model, attacked alike
    top, rest       share of the edit of the last perceptron's outputs that the attack takes back,
                    along their top 8 components and along all others

    RepSelect              the catalogue's row: a curvature's moments, of all matrices, taken once
    RepSelect, as trained  centred moments of the objective, of the perceptrons, anew every 4 steps

The two differ in all of that at once, so nothing here says which of it matters. The paper's claim
[notes] is that RepSelect's `lasting` is at least 4 times that of each baseline: it is judged by
`lasting` less 4 times the baseline's, seed by seed, and not by ratios, of which a small baseline
makes anything. MCU's are that `top` is above `rest` for edits of the usual kind, and that it lasts
longer than RMU.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jedit import metrics
from jedit.attacks import relearn
from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import answers_only, batches
from jedit.methods import CATALOGUE, Material, repselect, repselect_moments
from jedit.metrics import recovery_by_component
from jedit.requests import Refit, unlearn_refitted
from jedit.tracing import Leaving
from jedit.training import Watch, unlearn
from tests.bench.claims.evidence import interval, kept, parser, shown, write
from tests.bench.claims.scenes import authors_model

BUDGET, STEPS, EVERY, REFIT = 0.1, 16, 2, 4
ADAM, LENGTH, PRICE = (3e-4, 1e-3), (0.03, 0.1, 0.3), (1e-5, 1e-4)
SITE = "blocks/1/mlp/down/kernel"
TOP = 8
SELECT = r"/(attn|mlp)/"
TRAINED = "RepSelect, as trained"
BASELINES = ("NPO", "GradDiff", "RMU", "NPO (natural)")
RATES = {
    **dict.fromkeys(("NPO", "GradDiff", "RMU", "MCU"), ADAM),
    "NPO (natural)": PRICE,
    "RepSelect": LENGTH,
    TRAINED: LENGTH,
}


class Setup(NamedTuple):
    """A seed's model and rows.

    Attributes:
        apply: `apply(params, inputs) -> logits`.
        original: trained on all rows.
        forget: rows to be forgotten.
        retain: rows that methods see.
        heldout: retain rows that they do not.
        material: what the catalogue's rows are made of.
        key: of the batches.
    """

    apply: Callable
    original: PyTree
    forget: Batch
    retain: Batch
    heldout: Batch
    material: Material
    key: jax.Array


@functools.cache
def _adam(rate: float) -> optax.GradientTransformation:
    return optax.adam(rate)


@functools.cache
def _kfac(apply: Callable):
    return kfac(apply, Categorical(), select=SELECT)


def setup(seed: int, *, epochs: int = 15, num_authors: int = 20) -> Setup:
    """Train the model, and take what the methods need."""
    made = authors_model(seed, epochs=epochs, num_authors=num_authors)
    forget, retain, heldout = (made.take(part) for part in made.parts)
    original = made.fit(np.arange(len(made.data.targets)))
    key = jax.random.key(seed)
    fit = functools.partial(estimate, _kfac(made.apply), original, key=key)
    material = Material(
        made.apply,
        original,
        forget,
        curvature=fit(list(batches(retain, 64))),
        target_moments=fit([answers_only(forget)]),
        hidden_site="blocks/1/attn/query/kernel",
        layers=(SITE,),
        subjects=jnp.argmax(jnp.asarray(forget.mask) > 0, axis=1),
    )
    return Setup(made.apply, original, forget, retain, heldout, material, key)


def trajectory(scene: Setup, name: str, rate: float, steps: int) -> Iterator[PyTree]:
    """The params at each look of a run."""
    seen: list[PyTree] = []

    def keep(state, history) -> None:
        del history
        seen.append(jax.tree.map(jnp.copy, state.params))

    given = (scene.apply, scene.original, scene.forget, scene.retain)
    key = jax.random.clone(scene.key)
    if name == TRAINED:
        rows = [answers_only(scene.forget)]

        taken: list[Any] = []

        def moments(params: PyTree, reference: PyTree):
            # Its loop has no place for one who looks on, but comes by here.
            seen.append(jax.tree.map(jnp.copy, params))
            if (len(seen) - 1) * EVERY % REFIT == 0:
                options: dict[str, Any] = {"reference": reference, "select": "/mlp/"}
                options["key"] = jax.random.clone(key)
                taken[:] = [repselect_moments(scene.apply, params, rows, **options)]
            return taken[0]

        make = lambda curvature: repselect(curvature, learning_rate=rate)._replace(batch_size=16)  # noqa: E731
        run = {"refit": Refit(moments, EVERY), "steps": steps, "key": key}
        end, _ = unlearn_refitted(make, *given, **run)
        return iter([*seen[1:], end])  # the first are the untouched
    if name == "RepSelect":
        moments_once = scene.material.target_moments
        assert moments_once is not None
        method = repselect(moments_once, learning_rate=rate)
    elif name == "NPO (natural)":
        method = CATALOGUE[name].of(scene.material, predicted_kl=rate)
    else:
        material = scene.material.__class__(**{**vars(scene.material), "optimizer": _adam(rate)})
        method = CATALOGUE[name].of(material)
    watch = Watch(keep, EVERY)
    unlearn(method._replace(batch_size=16), *given, steps=steps, key=key, watch=watch)
    return iter(seen)


def kl(scene: Setup, params: PyTree) -> float:
    """The disruption: on retain rows that no method has seen."""
    return float(metrics.output_kl(scene.apply, scene.original, params, scene.heldout))


def nll_of(scene: Setup, params: PyTree, rows: Batch) -> float:
    """The mean NLL of the answers' tokens, row by row."""
    return float(np.mean(metrics.answer_nll_per_row(scene.apply, params, rows)))


def at_budget(scene: Setup, looks: Iterator[PyTree]) -> tuple[PyTree, float]:
    """The model at the budget where a run first passes it, or the last, and its cost."""
    inside, cost = scene.original, 0.0
    for outside in looks:
        price = kl(scene, outside)
        if np.isfinite(price) and price <= BUDGET:
            inside, cost = outside, price
            continue
        low, high = 0.0, 1.0
        begin = inside
        for _ in range(8):
            share = 0.5 * (low + high)
            between = jax.tree.map(lambda a, b, t=share: a + t * (b - a), begin, outside)
            price = kl(scene, between)
            if np.isfinite(price) and price <= BUDGET:
                inside, cost, low = between, price, share
            else:
                high = share
        break
    return inside, cost


def best(scene: Setup, name: str, rates, steps: int) -> tuple[PyTree, float]:
    """The model that has forgotten most, of those at the budget, and what it cost."""
    found = [at_budget(scene, trajectory(scene, name, rate, steps)) for rate in rates]
    return max(found, key=lambda one: nll_of(scene, one[0], scene.forget))


def attacked(scene: Setup, params: PyTree, updates: int) -> tuple[PyTree, Batch, float]:
    """The attacked model at the better rate, the rows asked, and their NLL."""
    taught = jax.tree.map(lambda x: x[::6], scene.forget)
    is_asked = np.arange(len(scene.forget.targets)) % 6 > 0
    asked = jax.tree.map(lambda x: x[is_asked], scene.forget)
    tries = []
    for rate in (3e-4, 1e-3):
        again = relearn(
            scene.apply,
            params,
            taught,
            optimizer=_adam(rate),
            looks=(updates,),
            measure=lambda _: 0,
            key=jax.random.fold_in(scene.key, 3),
        ).params
        tries.append((nll_of(scene, again, asked), again))
    loss, again = min(tries, key=lambda one: one[0])
    return again, asked, loss


Found = dict[str, dict[str, float]]


def measured(
    scene: Setup,
    *,
    rates: dict[str, tuple[float, ...]] = RATES,
    steps: int = STEPS,
    updates: int = 20,
) -> Found:
    """Every method's numbers."""
    hidden = Leaving(SITE)
    _, asked, floor = attacked(scene, scene.original, updates)
    found: Found = {"untouched": {"before": nll_of(scene, scene.original, asked), "after": floor}}
    models = {name: best(scene, name, given, steps) for name, given in rates.items()}
    for name, (params, cost) in models.items():
        again, _, after = attacked(scene, params, updates)
        record = {"kl": cost, "before": nll_of(scene, params, asked), "after": after}
        record["lasting"] = after - floor
        rows = answers_only(asked)
        chain = (scene.original, params, again)
        back = recovery_by_component(hidden, scene.apply, chain, rows)
        record |= {"top": back.band(0, TOP), "rest": back.band(TOP, None)}
        record["change in top"] = float(np.sum(back.change[:TOP]) / np.sum(back.change))
        found[name] = record
    return found


def report(runs: list[Found]) -> dict[str, Any]:
    """Intervals over the seeds, of the methods and of what the claims compare, pair by pair."""
    summary: dict[str, Any] = {
        name: {word: interval([run[name][word] for run in runs]) for word in of_first}
        for name, of_first in runs[0].items()
    }
    pairs = [(ours, other) for ours in ("RepSelect", TRAINED) for other in BASELINES]
    compared = {}
    for ours, other, times in [(*pair, t) for pair in pairs for t in (1, 4)] + [("MCU", "RMU", 1)]:
        if ours in runs[0] and other in runs[0]:
            found = [run[ours]["lasting"] - times * run[other]["lasting"] for run in runs]
            compared[f"{ours} - {times} x {other}"] = interval(found)
    return {"summary": summary, "compared": compared}


def run(given: argparse.Namespace) -> list[Found]:
    """The seeds; those measured before are read, not run again."""
    size: dict[str, Any] = {"rates": RATES}
    scene: dict[str, Any] = {}
    if given.quick:
        rates = {name: rates[:1] for name, rates in RATES.items()}
        size, scene = {"rates": rates, "steps": 6, "updates": 2}, {"epochs": 1, "num_authors": 5}
    runs = []
    for seed in range(given.seeds):
        path = given.out / f"repselect{'-quick' if given.quick else ''}-{seed}.json"
        make = lambda seed=seed: {"found": measured(setup(seed, **scene), **size)}  # noqa: E731
        runs.append(kept(path, size | scene, make)["found"])
        print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    return runs


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a small scene, a few steps")
    given = options.parse_args(arguments)
    runs = run(given)
    found = report(runs)
    columns = ("kl", "before", "after", "lasting", "change in top", "top", "rest")
    print("|  | " + " | ".join(columns) + " |")
    print("| --- " * (1 + len(columns)) + "|")
    for name, by in found["summary"].items():
        cells = [shown(by[c]) if c in by else "" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, less in found["compared"].items():
        print(f"{name}: {shown(less)}")
    write("repselect", given.out, {"runs": runs, **found})


if __name__ == "__main__":
    main()
