"""What is made of one factor at one size: products, Cholesky, an inverse, eigenvectors.

    python -m tests.bench.gpu_run.decompositions --size 4096 --json FILE [--only eigh,cholesky]

The matrix is the moment A = XᵀX / n of n = d rows whose columns shrink like 1/√j, plus a tenth of
its mean eigenvalue on the diagonal where it is inverted: in float32, at full precision. What is
cheap comes first, and the file is written after each, so that a decomposition that runs out of time
or memory, or that the device's library refuses, costs itself alone.

    product     A A: the rate that all others are held against        2 d³ flops
    cholesky    L Lᵀ = A + λ, and a solve of 64 columns               d³/3
    iteration   k = min(256, d/8) leading eigenvectors, m = 2k + 8    2 d² m + 4 d m² in a round
    inverse     (A + λ)⁻¹ by products alone (Newton-Schulz)           4 d³ a round
    eigh        all eigenvectors, as jedit takes them                 2 d³, by the plan's count

Each has its residual, measured on one probe or on the eigenvectors found: a speed without it says
nothing.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jedit.curvature import newton_schulz
from jedit.curvature.eigenbases import eigh
from jedit.curvature.subspace import leading, num_columns
from tests.bench.gpu_run.bench_steps import timed
from tests.bench.gpu_run.rates import peak_gib
from tests.bench.gpu_run.stages import write_json

HIGHEST = lax.Precision.HIGHEST
DAMPING = 0.1  # of the mean eigenvalue: jedit's default
LEADING = 256
LONG = 3.0  # seconds of a first call after which there is no second
SETTLED = 0.3  # seconds of calls that are enough: clocks take a while to settle


def matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def moment(size: int) -> Array:
    """A: the features' scales fall like 1/√j, so that its eigenvalues fall like 1/j."""

    @jax.jit
    def made(key):
        scale = jnp.arange(1, size + 1, dtype=jnp.float32) ** -0.5
        x = jax.random.normal(key, (size, size), jnp.float32) * scale[None]
        return matmul(x.T, x) / size

    return jax.block_until_ready(made(jax.random.key(0)))


@jax.jit
def damped(a: Array) -> Array:
    return a + DAMPING * jnp.mean(jnp.diagonal(a)) * jnp.eye(len(a), dtype=a.dtype)


@jax.jit
def product(a: Array) -> Array:
    return matmul(a, a)


@jax.jit
def cholesky(a: Array) -> Array:
    return jnp.linalg.cholesky(damped(a))


@jax.jit
def cholesky_solve(factor: Array, x: Array) -> Array:
    return jax.scipy.linalg.cho_solve((factor, True), x)


@jax.jit
def inverse(a: Array) -> tuple[Array, Array]:
    """(A + λ)⁻¹ by products alone, as `factorize="inverse"` makes it, and the rounds it took."""
    level = DAMPING * jnp.mean(jnp.diagonal(a))[None]
    one = jnp.eye(len(a), dtype=a.dtype)[None]
    x, info = newton_schulz.solve(damped(a)[None], one, level, matmul)
    return x[0], info.steps


def iteration(a: Array, rank: int) -> tuple[Array, Array]:
    """The leading eigenvalues, rising, and their eigenvectors (d, k), as `Factorize(rank=)` has."""
    factor = leading(a[None], rank)
    assert factor.basis is not None  # what is led by eigenvectors has them
    assert factor.eigenvalues is not None
    return factor.eigenvalues[0, 1:], factor.basis[0]


def timed_again(job: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of the first call, which compiles, and the median of more, unless it took long."""
    first, found = timed(job)
    seconds = []
    while first < LONG and sum(seconds) < SETTLED and len(seconds) < 20:
        del found  # so that two results are never held
        again, found = timed(job)
        seconds.append(again)
    return {"first_seconds": first, "seconds": statistics.median(seconds or [first])}, found


def by_product(a: Array) -> tuple[dict[str, float], float]:
    times, square = timed_again(lambda: product(a))
    x = probe(a)
    return times | {"residual": apart(matmul(square, x), matmul(a, matmul(a, x)))}, 2 * len(a) ** 3


def by_cholesky(a: Array) -> tuple[dict[str, float], float]:
    times, factor = timed_again(lambda: cholesky(a))
    x = jax.random.normal(jax.random.key(2), (len(a), min(64, len(a))), a.dtype)
    solving, found = timed_again(lambda: cholesky_solve(factor, x))
    residual = apart(matmul(damped(a), found), x)
    times |= {"solve_seconds": solving["seconds"], "residual": residual}
    return times, len(a) ** 3 / 3


def by_inverse(a: Array) -> tuple[dict[str, float], float]:
    times, (x, rounds) = timed_again(lambda: inverse(a))
    v = probe(a)
    times |= {"rounds": int(rounds), "residual": apart(matmul(damped(a), matmul(x, v)), v)}
    return times, 4 * len(a) ** 3 * int(rounds)


def by_iteration(a: Array) -> tuple[dict[str, float], float]:
    d, rank = len(a), min(LEADING, len(a) // 8)
    times, (values, q) = timed_again(lambda: iteration(a, rank))
    times |= {"rank": rank, "residual": apart(matmul(a, q), q * values[None])}
    m = num_columns(rank)
    return times, 2 * d**2 * m + 4 * d * m**2


def by_eigh(a: Array) -> tuple[dict[str, float], float]:
    times, (values, q) = timed_again(lambda: eigh(a, a.dtype))
    x = probe(a)
    residual = apart(matmul(a, matmul(jnp.asarray(q), x)), matmul(q, values[:, None] * x))
    return times | {"residual": residual}, 2 * len(a) ** 3


WAYS = {
    "product": by_product,
    "cholesky": by_cholesky,
    "iteration": by_iteration,
    "inverse": by_inverse,
    "eigh": by_eigh,
}


def probe(a: Array) -> Array:
    return jax.random.normal(jax.random.key(3), (len(a), 1), a.dtype)


def apart(one: Array, other: Array) -> float:
    """How far two arrays are apart, relative to the second."""
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--size", type=int, required=True)
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--only", default=",".join(WAYS))
    options.add_argument("--toy", action="store_true", help="changes nothing: the size says it")
    given = options.parse_args(arguments)
    found: dict[str, Any] = {"size": given.size, "ways": {}}
    a = moment(given.size)
    rate = None
    for name in given.only.split(","):
        try:
            row, flops = WAYS[name](a)
            rate = flops / row["seconds"] if name == "product" else rate
            row["flops"], row["peak_gib"] = flops, peak_gib()
            # Its time over that of so many flops in a product of this size.
            row["multiple"] = None if rate is None else row["seconds"] * rate / flops
        except Exception as error:  # noqa: BLE001 - the library's refusal is the finding
            row = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
        found["ways"][name] = row
        write_json(given.json, found)


if __name__ == "__main__":
    main()
