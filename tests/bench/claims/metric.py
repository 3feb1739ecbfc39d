"""Claim: a step in the metric of the outputs (K-FADE) forgets more, at equal retain KL, than one
projected on the null space of the inputs alone, or preconditioned by them; and by how much.

    python -m tests.bench.claims.metric [--seeds 5] [--scenes hand class authors]

The same four steps and the same line search on the true retain KL in every metric; the forget NLL
is read off, between budgets, where the KL(original ‖ edited) on held-out retain rows is 0.01
(digits) or 0.05 nats (authors). Each metric's damping or threshold is the best in the geometric
mean over all seeds, of those that the numbers file lists.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jedit import metrics
from jedit.curvature import Curvature, Factor, Kronecker, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches
from jedit.edits import apply_edit
from jedit.geometry import null_space
from jedit.methods import kfade
from tests.bench.claims.evidence import interval, parser, shown, shown_ratio, write
from tests.bench.claims.scenes import Scene, authors, digits

BUDGETS = (0.3, 1.0, 3.0, 10.0, 30.0)  # of the price
SMALLER = (0.1, 0.03, 0.01)  # where the first of them costs more than the price
SCENES = {
    "hand": (functools.partial(digits, forget="hand"), 0.01),
    "class": (functools.partial(digits, forget="class"), 0.01),
    "authors": (authors, 0.05),
}
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
THRESHOLDS = (1e-4, 1e-3, 1e-2, 0.03, 0.1)
LEAST_KL = 1e-8
HARD = 1e-6  # relative damping at which what is not free does not move


def with_identity_outputs(curvature: Curvature) -> Curvature:
    """G = I: the metric of the inputs alone."""
    factors = dict(curvature.factors)
    for block in curvature.blocks.values():
        if isinstance(block, Kronecker):
            old = factors[block.output]
            if old.basis is None:
                flat = jnp.ones_like(old.matrix)
                factors[block.output] = Factor(flat, None, flat)
            else:
                eye = jnp.broadcast_to(jnp.eye(old.matrix.shape[-1]), old.matrix.shape)
                factors[block.output] = Factor(eye, eye, jnp.ones_like(old.eigenvalues))
    return dataclasses.replace(curvature, factors=factors)


def null_space_of_inputs(curvature: Curvature, threshold: float) -> Curvature:
    """G = I, and A with eigenvalues 0 in its null space and equal ones above it, of mean 1.

    A factor that is free throughout has eigenvalues of 1, so that its part of a step is as long as
    the free parts of the others.
    """
    projector = null_space(curvature, threshold=threshold)
    factors = dict(with_identity_outputs(curvature).factors)
    for name, weights in projector.weights.items():
        held = jnp.mean(1 - weights, axis=1, keepdims=True)
        values = jnp.where(held > 0, (1 - weights) / jnp.where(held > 0, held, 1), HARD)
        factors[name] = dataclasses.replace(factors[name], eigenvalues=values)
    return dataclasses.replace(curvature, factors=factors)


def identity(curvature: Curvature) -> Curvature:
    """Eigenvalues of 1: plain ascent."""
    factors = {
        name: dataclasses.replace(factor, eigenvalues=jnp.ones_like(factor.eigenvalues))
        for name, factor in curvature.factors.items()
    }
    return dataclasses.replace(curvature, factors=factors)


@functools.cache
def estimator(apply, temperature: float, select: str | None):
    """One for each function, so that a second seed compiles nothing."""
    return kfac(apply, Categorical(temperature), select=select)


def contenders(found: Scene, *, key) -> dict[tuple[str, float], tuple[Curvature, float]]:
    """By metric and its setting: a curvature and the damping to step with."""
    plain, tempered = (
        estimate(
            estimator(found.apply, temperature, found.select),
            found.params,
            list(batches(found.retain, 64)),
            key=key,
        )
        for temperature in (1.0, 4.0)
    )
    inputs = with_identity_outputs(plain)
    made = {("identity (plain ascent)", 0.0): (identity(plain), 1.0)}
    for threshold in THRESHOLDS:
        free = null_space_of_inputs(plain, threshold)
        made["null space of the inputs", threshold] = (free, HARD)
    for damping in DAMPINGS:
        made["inputs alone, damped", damping] = (inputs, damping)
        made["K-FADE", damping] = (plain, damping)
        made["K-FADE, temperature 4", damping] = (tempered, damping)
    return made


def forgotten_at(found: Scene, curvature: Curvature, damping: float, price: float) -> float:
    """Forget NLL where the held-out KL is `price`, between the budgets' points; NaN: at none."""
    forget, heldout = list(batches(found.forget, 64)), list(batches(found.heldout, 64))
    probe = jax.tree.map(lambda x: x[:64], found.retain)

    def point(budget: float) -> tuple[float, float]:
        edit, _ = kfade(
            found.apply,
            found.params,
            curvature,
            forget,
            probe,
            budget=budget * price,
            damping=damping,
        )
        params = apply_edit(found.params, edit)
        kl = metrics.output_kl(found.apply, found.params, params, heldout)
        return kl, metrics.nll(found.apply, params, forget)

    return bracketed(point, price)


def bracketed(point: Callable[[float], tuple[float, float]], price: float) -> float:
    """What a budget's (KL, value) is where the KL is `price`; NaN: the budgets have one side."""
    points = [point(BUDGETS[0])]
    is_dear = points[0][0] > price
    for budget in SMALLER if is_dear else BUDGETS[1:]:
        points.append(point(budget))
        if (points[-1][0] > price) != is_dear:
            kls, values = np.array(sorted(points)).T
            return float(np.interp(np.log(price), np.log(np.maximum(kls, LEAST_KL)), values))
    return float("nan")


def main() -> None:
    """Run over scenes and seeds and write what came out."""
    options = parser(__doc__)
    options.add_argument("--scenes", nargs="+", default=list(SCENES), choices=list(SCENES))
    given = options.parse_args()
    table = []
    print("| scene, held-out KL | metric | setting | forget NLL | tempered K-FADE's over it |")
    print("| --- | --- | --- | --- | --- |")
    for name in given.scenes:
        make, price = SCENES[name]
        forgotten: dict[tuple[str, float], list[float]] = {}
        for seed in range(given.seeds):
            found = make(seed)
            made = contenders(found, key=jax.random.key(3000 + seed))
            for which, (curvature, damping) in made.items():
                value = forgotten_at(found, curvature, damping, price)
                forgotten.setdefault(which, []).append(value)
        lines = summary(name, price, forgotten)
        table += lines
        for line in lines:
            print(
                f"| {name}, {price:g} | {line['metric']} | {line['setting']:g} | "
                f"{shown(line['forget_nll'])} | {shown_ratio(line['log_ratio'])} |",
                flush=True,
            )
        write("metric", given.out, {"table": table})


def summary(name: str, price: float, forgotten: dict) -> list[dict]:
    """Each metric at its best setting, and the tempered K-FADE's forget NLL over its, in logs."""
    best: dict[str, tuple[str, float]] = {}
    # A setting at which not every seed has the price between two points comes first, so never best.
    sums = {which: np.sum(np.log(values)) for which, values in forgotten.items()}
    for which in sorted(sums, key=lambda which: np.nan_to_num(sums[which], nan=-np.inf)):
        best[which[0]] = which
    reference = np.array(forgotten[best["K-FADE, temperature 4"]])
    return [
        {
            "scene": name,
            "price": price,
            "metric": which[0],
            "setting": which[1],
            "forget_nll": interval(forgotten[which]),
            "log_ratio": interval(np.log(reference / forgotten[which])),
            "all_settings": {f"{w[1]:g}": v for w, v in forgotten.items() if w[0] == which[0]},
        }
        for which in best.values()
    ]


if __name__ == "__main__":
    main()
