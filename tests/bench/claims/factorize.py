"""Claims: (1) a damped solve by Cholesky takes at most a tenth of the time of eigenvectors, at
d = 1,024 to 4,864; (2) so does an inverse by products of matrices alone; (3) what is forgotten at a
matched true KL differs by less than 10% between exact and factored damping, by K-FADE and by
natural steps.

    python -m tests.bench.claims.factorize --only speed [--quick]       float32, one core
    python -m tests.bench.claims.factorize --only effect --seeds 3 [--quick]

Speed: the second moment of 2 d rows whose coordinates fall off as 1/i, damped by 0.1 of its mean
eigenvalue; each way gives one axis of one solve with d columns, and all are timed in one run, with
the rate of a product of matrices before and after at each size. Cholesky is the library's routine;
LAPACK's through JAX is timed beside it. Compiling is not timed.

Effect: a CNN trained on digits is to forget a class, a GPT three invented authors. Both kinds of
damping are given the same moments and the same grid of dampings, and natural steps the same
predicted KL; the forget NLL is read off where the KL on retain rows that no edit saw is 0.01 nats
(0.05), between budgets on both sides of it. Each kind has the damping that is best for it in the
geometric mean of the seeds; ratios are paired by seed.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedit import metrics, unlearn
from jedit.core.precision import HIGHEST
from jedit.curvature import Curvature, Factor, estimate, kfac, newton_schulz
from jedit.curvature.cholesky import cholesky
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches
from jedit.methods import natural
from jedit.objectives import NPO, with_retain
from jedit.transforms import falling
from tests.bench.claims import evidence
from tests.bench.claims.metric import BUDGETS, SCENES, SMALLER, bracketed, forgotten_at
from tests.bench.claims.scenes import Scene, digits

SIZES = (1024, 2048, 4096, 4864)
DAMPING = 0.01  # the root of which is put on each factor
DAMPINGS = {
    "K-FADE": (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0),
    "natural steps": (1e-3, 1e-2, 0.1, 1.0),
}
STEPS = 16
KINDS = ("exact", "factored")


def seconds(function: Callable, *args: Any, rounds: int = 3) -> float:
    """The least seconds of a compiled call."""
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - start)
    return min(found)


def moment(d: int) -> jax.Array:
    """The second moment of rows whose coordinates fall off."""
    rng = np.random.default_rng(d)
    rows = rng.standard_normal((2 * d, d), np.float32) / np.arange(1, d + 1, dtype=np.float32)
    return jnp.asarray(rows.T @ rows / len(rows))


@jax.jit
def _product(x, y):
    return jnp.matmul(x, y, precision=HIGHEST)


@jax.jit
def _by_eigenvectors(values, basis, x, level):
    return _product(basis, _product(basis.T, x) / (values + level)[:, None])


_eigh, _cholesky, _lapack = map(jax.jit, (jnp.linalg.eigh, cholesky, jnp.linalg.cholesky))
_solve = jax.jit(lambda root, x: jax.scipy.linalg.cho_solve((root, True), x))


@jax.jit
def _inverse(damped, level):
    one = jnp.eye(damped.shape[-1], dtype=damped.dtype)[None]
    product = functools.partial(jnp.matmul, precision=HIGHEST)
    return newton_schulz.solve(damped[None], one, level[None], product)


def speed(d: int) -> dict[str, float]:
    """Seconds of each way at one size, and how far the solutions are apart."""
    A = moment(d)
    level = DAMPING**0.5 * jnp.trace(A) / d
    damped = A + level * jnp.eye(d, dtype=A.dtype)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((d, d), np.float32))
    before = seconds(_product, A, x)
    rounds = 3 if d < 3000 else 1
    found = {
        "eigh": seconds(_eigh, A, rounds=rounds),
        "cholesky": seconds(_cholesky, damped[None]),
        "cholesky by LAPACK": seconds(_lapack, damped[None]),
        "newton-schulz": seconds(_inverse, damped, level, rounds=rounds),
    }
    values, basis = _eigh(A)
    (root,) = _cholesky(damped[None])
    (X,), info = _inverse(damped, level)
    found |= {
        "solve by eigenvectors": seconds(_by_eigenvectors, values, basis, x, level),
        "solve by Cholesky": seconds(_solve, root, x),
        "solve by the inverse": seconds(_product, X, x),
    }
    rate = 2 * d**3 / 1e9
    exact = _by_eigenvectors(values, basis, x, level)
    others = {"cholesky": _solve(root, x), "newton-schulz": _product(X, x)}
    found |= {
        f"{name} differs by": float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
        for name, y in others.items()
    }
    return found | {
        "GFLOP/s before": rate / before,
        "GFLOP/s after": rate / seconds(_product, A, x),
        "products": 2 * int(info.steps),
        "residual": float(info.residual[0]),
    }


def batched(d: int, layers: int) -> dict[str, float]:
    """Seconds of Cholesky of several layers in one call, and one call each; LAPACK's beside it."""
    matrices = jnp.stack([moment(d) + 0.1 * jnp.eye(d, dtype=jnp.float32)] * layers)
    each = [layer[None] for layer in matrices]
    found = {}
    for suffix, function in (("", _cholesky), (", LAPACK", _lapack)):
        found[f"one call{suffix}"] = seconds(function, matrices)
        one_by_one = lambda x, function=function: [function(layer) for layer in x]  # noqa: E731
        found[f"one by one{suffix}"] = seconds(one_by_one, each)
    return found


def undecomposed(curvature: Curvature) -> Curvature:
    """The same moments, damped apart."""
    factors = {
        name: f if f.basis is None else Factor(f.matrix, None, None, "cholesky")
        for name, f in curvature.factors.items()
    }
    return dataclasses.replace(curvature, factors=factors)


@functools.cache
def estimator(apply: Callable, select: str | None):
    """One for each function, so that a second seed compiles nothing."""
    return kfac(apply, Categorical(), select=select)


def effect(scene: str, seed: int, *, quick: bool) -> dict[str, dict[str, float]]:
    """By method, kind of damping and damping: the forget NLL at the price, NaN: it has one side."""
    make, price = SCENES[scene]
    found = digits(seed, epochs=2) if quick else make(seed)
    rows = list(batches(found.retain, 64))
    key = jax.random.key(100 + seed)
    exact = estimate(estimator(found.apply, found.select), found.params, rows, key=key)
    nll: dict[str, float] = {}
    for kind, curvature in (("exact", exact), ("factored", undecomposed(exact))):
        for damping in DAMPINGS["K-FADE"][2:3] if quick else DAMPINGS["K-FADE"]:
            nll[f"K-FADE, {kind}, {damping}"] = forgotten_at(found, curvature, damping, price)
        for damping in DAMPINGS["natural steps"][1:2] if quick else DAMPINGS["natural steps"]:
            point = functools.partial(
                _natural, found, curvature, damping, price, seed, 2 if quick else STEPS
            )
            nll[f"natural steps, {kind}, {damping}"] = bracketed(point, price)
            jax.clear_caches()  # each call compiles its loop, and a process has so much room
        print(f"{scene}, seed {seed}, {kind}", file=sys.stderr, flush=True)
    return {"nll": nll}


def _natural(
    found: Scene, curvature, damping: float, price: float, seed: int, steps: int, budget: float
) -> tuple[float, float]:
    """Held-out KL and forget NLL after steps that, all one way, are predicted to spend a budget.

    Of a hundredth of the price: at a temperature of 1 these models' true KL is far beyond it.
    """
    spent = 0.01 * budget * price * 4 / steps**2  # the steps' lengths fall linearly to nothing
    method = natural(
        with_retain(NPO()), curvature, damping=damping, predicted_kl=falling(spent, steps)
    )
    sets = (found.forget, found.retain)
    key = jax.random.key(200 + seed)
    params = unlearn(method, found.apply, found.params, *sets, steps=steps, key=key)[0]
    kl = metrics.output_kl(found.apply, found.params, params, list(batches(found.heldout, 64)))
    return kl, metrics.nll(found.apply, params, list(batches(found.forget, 64)))


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """By method: each kind's best damping, its NLL, and the paired log ratio of the two."""
    table = {}
    for method in DAMPINGS:
        logs = {
            (kind, damping): np.log([r["nll"][f"{method}, {kind}, {damping}"] for r in records])
            for kind in KINDS
            for damping in DAMPINGS[method]
            if f"{method}, {kind}, {damping}" in records[0]["nll"]
        }
        # A damping at which not every seed has the price between two points is no candidate.
        means = {which: np.nan_to_num(x.mean(), nan=-np.inf) for which, x in logs.items()}
        best = {
            kind: max((w for w in logs if w[0] == kind), key=means.__getitem__) for kind in KINDS
        }
        pairs = {"each at its best": (best["exact"], best["factored"])}
        pairs |= {f"both at {d}": (("exact", d), ("factored", d)) for _, d in list(logs)}
        table[method] = {
            "best": dict(best.values()),
            "forget NLL": {f"{k}, {d}": float(np.exp(x.mean())) for (k, d), x in logs.items()},
            "factored over exact, log": {
                name: evidence.known_interval(list(logs[other] - logs[one]))
                for name, (one, other) in pairs.items()
            },
        }
    return table


def _print(scene: str, table: dict[str, Any]) -> None:
    for method, row in table.items():
        for name, ratio in row["factored over exact, log"].items():
            told = f"{evidence.shown_ratio(ratio)} | {ratio['seeds']}"
            at = row["best"] if name == "each at its best" else ""
            print(f"| {scene} | {method} | {name} {at} | {told} |", flush=True)


def main() -> None:
    """Measure and write what came out."""
    options = evidence.parser(__doc__, seeds=3)
    options.add_argument("--only", choices=["speed", "effect"], help="None: both")
    options.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="d of the speed")
    options.add_argument("--scenes", nargs="+", default=["class", "authors"], choices=list(SCENES))
    options.add_argument("--quick", action="store_true", help="one small size, one damping")
    given = options.parse_args()
    name = "factorize" + (f"_{given.only}" if given.only else "")
    numbers: dict[str, Any] = {}
    if given.only != "effect":
        numbers["speed"] = {}
        for d in (256,) if given.quick else given.sizes:
            numbers["speed"][d] = speed(d)
            print(d, numbers["speed"][d], flush=True)
        cases = [(128, 4)] if given.quick else [(256, 24), (1024, 8)]
        numbers["batched"] = {f"{n} of {d}": batched(d, n) for d, n in cases}
        print(numbers["batched"], flush=True)
    if given.only != "speed":
        settings = {"dampings": DAMPINGS, "budgets": [*SMALLER, *BUDGETS], "steps": STEPS}
        numbers["effect"] = {}
        for scene in ("class",) if given.quick else given.scenes:
            records = [
                evidence.kept(
                    given.out / "factorize" / f"{scene}-{seed}.json",
                    settings | {"price": SCENES[scene][1], "quick": given.quick},
                    functools.partial(effect, scene, seed, quick=given.quick),
                )
                for seed in range(given.seeds)
            ]
            numbers["effect"][scene] = summary(records)
            _print(scene, numbers["effect"][scene])
    evidence.write(name, given.out, numbers)


if __name__ == "__main__":
    main()
