"""Claims: engrams of disjoint subsets add; whether they are better in the metric of the output KL.

    python -m tests.bench.claims.engrams [--seeds 5] [--authors 3]

Every edit is scaled by each α of one grid (K-FADE by its budgets), and judged against the model
retrained without the forget rows: KL(retrained ‖ edited) on them, KL(original ‖ edited) on held-out
retain rows, tug-of-war (1 - |Δforget|)(1 - |Δheldout|)(1 - |Δtest|) of accuracies. A method's best
point is that with the smallest KL to the retrained model within the scene's held-out KL; its best
tug-of-war is the largest of the grid within it. In the output metric all are of strength
"adaptive"; a damping of 1000 is that of the inputs, the sets weighted by their G.

Addition, on the digits model: with the statistics kept, classes 7 and 3 are erased in either order
and at once; with the statistics taken again after the first edit, in either order.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

import jedit
from jedit.core.outputs import counted_outputs
from jedit.data import batches
from jedit.methods import Ascent, curvature_engram, engram, kfade
from jedit.objectives import token_kl, token_nll
from jedit.objectives.token_nll import masked_mean
from tests.bench.claims.engram_scenes import JudgedScene, authors_scenes, digits_scenes
from tests.bench.claims.evidence import interval, parser, shown, write
from tests.bench.claims.scenes import CNN, digits_model

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
# Temperature and damping of the output metric.
SETTINGS = ((1.0, 0.0), (1.0, 0.1), (1.0, 1.0), (1.0, 10.0), (1.0, 1e3), (4.0, 0.0), (4.0, 1.0))
KFADE = (4.0, 0.1, 4)  # temperature, damping and steps, out of the demo's grid
PLAIN = "engram, adaptive"


class Judge:
    """What edited models are worth; the outputs that they are compared with are computed once."""

    def __init__(self, found: JudgedScene):
        self.apply = found.apply
        self.sets = (found.forget, found.heldout, found.test)
        models = (found.retrained, found.original, found.retrained)
        pairs = zip(models, self.sets, strict=True)
        self.references = tuple(_outputs(found.apply, m, rows.inputs) for m, rows in pairs)
        self.accuracy = self._measured(found.retrained)[:, 0]

    def _measured(self, params) -> np.ndarray:
        return np.asarray(_measured(self.apply, params, self.sets, self.references), np.float64)

    def __call__(self, params) -> dict[str, float]:
        accuracy, nll, kl = self._measured(params).T
        return {
            "forget_nll": nll[0],
            "to_retrained": kl[0],
            "heldout_kl": kl[1],
            "tug_of_war": float(np.prod(1 - np.abs(accuracy - self.accuracy))),
        }


@functools.partial(jax.jit, static_argnums=0)
def _outputs(apply, params, inputs):
    return apply(params, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _measured(apply, params, sets, references):
    """Accuracy, NLL and KL from the reference of every set, (sets, 3)."""
    found = []
    for rows, reference in zip(sets, references, strict=True):
        logits = apply(params, rows.inputs)
        counted = counted_outputs(rows, logits.shape[:-1])
        targets = jnp.where(counted, rows.targets, 0)
        is_hit = (jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype)
        values = (is_hit, token_nll(logits, targets), token_kl(reference, logits))
        found.append(jnp.stack([masked_mean(v, counted) for v in values]))
    return jnp.stack(found)


@functools.cache
def _kfac(apply, temperature, select, fisher):
    """One estimator for all seeds of a model: it compiles once."""
    likelihood = jedit.likelihoods.Categorical(temperature)
    return jedit.kfac(apply, likelihood, select=select, fisher=fisher)


def statistics(found: JudgedScene, temperature: float, *, key):
    """Curvature of the forget rows and of the retain rows; of a text, answer tokens alone."""
    estimator = _kfac(found.apply, temperature, found.select, found.fisher)
    for rows, k in zip((found.forget, found.retain), jax.random.split(key), strict=True):
        rows = rows._replace(valid=rows.mask)
        yield jedit.estimate(estimator, found.original, batches(rows, found.chunk), key=k)


def methods(found: JudgedScene, *, key):
    """By name, a function of nothing to a method's strengths and edits."""
    curvatures = {
        t: list(statistics(found, t, key=jax.random.fold_in(key, int(t))))
        for t in {t for t, _ in SETTINGS}
    }

    def scaled(method, curvature, **options):
        edit, _ = method(found.original, *curvature, **options)
        return [(alpha, edit * alpha) for alpha in ALPHAS]

    def budgeted():
        retain = jax.tree.map(lambda x: x[: found.probe], found.retain)
        temperature, damping, steps = KFADE
        fixed = (found.apply, found.original, curvatures[temperature][1], found.forget, retain)
        for budget in found.budgets:
            run = {"damping": damping, "ascent": Ascent(steps)}
            yield budget, kfade(*fixed, budget=budget, **run)[0]

    makers = {}
    for strength in ("adaptive", "whole"):
        make = functools.partial(scaled, engram, curvatures[1.0], strength=strength)
        makers[f"engram, {strength}"] = make
    for temperature, damping in SETTINGS:
        name = f"output metric, temperature {temperature:g}, damping {damping:g}"
        fixed = (scaled, curvature_engram, curvatures[temperature])
        makers[name] = functools.partial(*fixed, damping=damping, strength="adaptive")
    return makers | {"K-FADE": budgeted}


def measured(found: JudgedScene, *, key) -> dict[str, list[dict[str, float]]]:
    """Every point of every method."""
    judge, points = Judge(found), {}
    for name, make in methods(found, key=key).items():
        points[name] = [
            {"strength": strength} | judge(jedit.apply_edit(found.original, edit))
            for strength, edit in make()
        ]
    points["untouched"] = [{"strength": 0.0} | judge(found.original)]
    return points


def best(points, kl_budget: float) -> dict[str, float]:
    """The point nearest to the retrained model within the budget, and the best tug-of-war."""
    within = [p for p in points if p["heldout_kl"] <= kl_budget] or points[:1]
    nearest = min(within, key=lambda p: p["to_retrained"])
    return nearest | {"best_tug_of_war": max(p["tug_of_war"] for p in within)}


def table(by_seed) -> dict[str, dict]:
    """Intervals over seeds of each method's best, and of its distance to the plain engram's."""
    found = {}
    for name in by_seed[0]:
        rows, plain = [s[name] for s in by_seed], [s[PLAIN] for s in by_seed]
        line = {f: interval([r[f] for r in rows]) for f in rows[0]}
        for f in ("to_retrained", "best_tug_of_war"):
            line[f"{f}_less_plain"] = interval(
                [r[f] - p[f] for r, p in zip(rows, plain, strict=True)]
            )
        found[name] = line
    return found


def show(name: str, lines: dict[str, dict]) -> None:
    """A table a scene."""
    fields = ("strength", "to_retrained", "to_retrained_less_plain", "heldout_kl")
    fields += ("best_tug_of_war", "best_tug_of_war_less_plain")
    print(f"\n| {name} | {' | '.join(fields)} |\n| --- |{' --- |' * len(fields)}")
    for method, line in lines.items():
        print(f"| {method} | {' | '.join(shown(line[f]) for f in fields)} |", flush=True)


def addition(seed: int, *, x64: bool) -> dict[str, dict[str, float]]:
    """Relative differences of the ways to erase two classes from one digits model."""
    rows, _, fit, _ = digits_model(seed)
    original = fit(rows)
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), original)
        labels = rows.labels
        chosen = (labels == 7, labels == 3, (labels != 7) & (labels != 3))
        parts = [rows.take(np.flatnonzero(c)).as_batch() for c in chosen]
        parts = [p._replace(inputs=p.inputs.astype(dtype)) for p in parts]
        estimator = _kfac(CNN, 1.0, None, "exact")

        def fitted(params):
            key = jax.random.key(0)
            return [jedit.estimate(estimator, params, batches(p, 256), key=key) for p in parts]

        def taken(method, params, curvatures, *classes):
            target = [curvatures[i] for i in classes]
            rest = [c for i, c in enumerate(curvatures) if i not in classes]
            return method(params, target, rest, strength="whole", scale=0.7)[0]

        inputs = rows.as_batch().inputs.astype(dtype)

        def difference(x, y):
            """Of weights, over the change that x is, and of the logits of all images."""
            leaves = zip(*map(jax.tree.leaves, (x, y, params)), strict=True)
            weights = [jnp.linalg.norm(a - b) / jnp.linalg.norm(a - p) for a, b, p in leaves]
            logits = [_outputs(CNN, model, inputs) for model in (x, y)]
            gap = jnp.linalg.norm(logits[0] - logits[1]) / jnp.linalg.norm(logits[0])
            return {"weights": float(max(weights)), "logits": float(gap)}

        kept = fitted(params)
        a, b, both = (taken(engram, params, kept, *c) for c in ((0,), (1,), (0, 1)))
        one = jedit.apply_edit(jedit.apply_edit(params, a), b)
        other = jedit.apply_edit(jedit.apply_edit(params, b), a)
        at_once = jedit.apply_edit(params, both)
        again = []
        for edit, left in ((a, 1), (b, 0)):
            first = jedit.apply_edit(params, edit)
            again.append(jedit.apply_edit(first, taken(engram, first, fitted(first), left)))
        a, b, both = (taken(curvature_engram, params, kept, *c) for c in ((0,), (1,), (0, 1)))
        return {
            "two orders": difference(one, other),
            "one by one and at once": difference(one, at_once),
            "two orders, statistics taken again": difference(*again),
            "one by one, statistics taken again or kept": difference(one, again[0]),
            "output metric, one by one and at once": difference(
                jedit.apply_edit(params, a + b), jedit.apply_edit(params, both)
            ),
        }


def main() -> None:
    """Run over the seeds and write what came out, after each kind of scene."""
    options = parser(__doc__)
    options.add_argument("--authors", type=int, default=3, help="seeds of the authors")
    given = options.parse_args()
    start, points, tables = time.perf_counter(), {}, {}
    sums = []
    for seed in range(given.seeds):
        by_dtype = {name: addition(seed, x64=name == "float64") for name in ("float32", "float64")}
        sums.append(by_dtype)
    print("| largest difference | dtype | of the weights | of the logits |\n|" + " --- |" * 4)
    for what, dtype in itertools.product(sums[0]["float32"], sums[0]):
        weights, logits = (max(s[dtype][what][of] for s in sums) for of in ("weights", "logits"))
        print(f"| {what} | {dtype} | {weights:.2g} | {logits:.2g} |", flush=True)
    for make, seeds in ((digits_scenes, given.seeds), (authors_scenes, given.authors)):
        bests = {}
        for seed in range(seeds):
            for found in make(seed):
                judged = measured(found, key=jax.random.key(1000 + seed))
                points.setdefault(found.name, []).append(judged)
                chosen = {n: best(p, found.kl_budget) for n, p in judged.items()}
                bests.setdefault(found.name, []).append(chosen)
                print(f"seed {seed}, {found.name}: {time.perf_counter() - start:.0f} s", flush=True)
        for name, by_seed in bests.items():
            tables[name] = table(by_seed)
            show(name, tables[name])
        seconds = time.perf_counter() - start
        numbers = {"seconds": seconds, "tables": tables, "addition": sums, "points": points}
        write("engrams", given.out, numbers)
    print(f"\n{seconds:.0f} s")


if __name__ == "__main__":
    main()
