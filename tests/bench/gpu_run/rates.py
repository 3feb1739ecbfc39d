"""What an estimation pass takes at the least, and what the device gives: flops, rates, memory.

Per position, and summed over the matrices that get a block, P the entries of all of them:

    factors       4 P forward and activation backward, Σ 2 d_in² + 2 d_out² for the moments
    eigenvalues   4 P the same, Σ 2 d_in² + 2 d_out² for the rotations, Σ 2 d_in d_out for the
                  per-example gradients

Full products are counted for every matrix, also where an input is shared or a product symmetric;
attention, norms, embedding and head are not counted at all, although they have to be computed.
"""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jedit.tracing import find_sites

HIGHEST = jax.lax.Precision.HIGHEST


class Flops(NamedTuple):
    """Of one position.

    Attributes:
        model: in the dtype that the model computes in: through the matrices and back, and moments
            of rows that are narrower than float32.
        statistics: other moments, or rotations and gradients, in float32 at full precision.
    """

    model: int
    statistics: int

    @property
    def all(self) -> int:
        """Both."""
        return self.model + self.statistics


def factor_flops(matrices: Iterable[tuple[int, int]], *, is_narrow: bool = False) -> Flops:
    """Of K-FAC's factors, for matrices (d_in, d_out) of a model in float32 or narrower."""
    shapes = list(matrices)
    model = sum(4 * d_in * d_out for d_in, d_out in shapes)
    moments = sum(2 * d_in**2 + 2 * d_out**2 for d_in, d_out in shapes)
    return Flops(model + moments, 0) if is_narrow else Flops(model, moments)


def eigenvalue_flops(matrices: Iterable[tuple[int, int]]) -> Flops:
    """Of EK-FAC's eigenvalues, for matrices (d_in, d_out)."""
    shapes = list(matrices)
    factors = factor_flops(shapes)
    gradients = sum(2 * d_in * d_out for d_in, d_out in shapes)
    return factors._replace(statistics=factors.statistics + gradients)


def matrices_of(
    apply: Callable, params: PyTree, inputs: PyTree, select: str
) -> list[tuple[int, int]]:
    """(d_in, d_out) of every matrix that gets a block of K-FAC, use by use."""
    weights = [site.weight for site in find_sites(apply, params, inputs, select=select).values()]
    return [(w.d_in, w.d_out) for w in weights for _ in range(w.layers)]


class Rates(NamedTuple):
    """Flops a second of a square product.

    Attributes:
        peak: in the dtype of the computation, as JAX multiplies it by default (on some devices a
            float32 product is rounded to fewer bits by default: TF32, bfloat16).
        full: in float32 at `Precision.HIGHEST`, as EK-FAC's statistics are.
    """

    peak: float
    full: float

    def between(self, other: "Rates") -> "Rates":
        """The mean of two measurements: time goes with the inverse, so that is averaged."""
        return Rates(*(2 / (1 / a + 1 / b) for a, b in zip(self, other, strict=True)))


def matmul_rates(dtype: DTypeLike, size: int) -> Rates:
    """Multiply size x size matrices, right now."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    flops = 2 * size**3
    return Rates(_rate(_product, x.astype(dtype), flops), _rate(_full_product, x, flops))


def moment_rates(dtype: DTypeLike, shape: tuple[int, int]) -> dict[str, float]:
    """Flops a second of the moment XᵀX of rows (n, d), summed in float32, in two ways.

    Products of bfloat16 numbers are exact in float32, so that both give the same moment, up to the
    order of additions; tensor cores take the second alone.

    Args:
        dtype: of the rows, as the model computes them.
        shape: of the rows.

    Returns:
        "cast to float32": at `Precision.HIGHEST`; "as they are": with
        `preferred_element_type=float32`.
    """
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
    flops = 2 * shape[0] * shape[1] ** 2
    ways = {"cast to float32": _cast_moment, "as they are": _moment}
    return {name: _rate(way, x, flops) for name, way in ways.items()}


def _rate(job: Callable[[Array], Array], x: Array, flops: int) -> float:
    """Flops a second of a job, over about a third of a second: clocks take a while to settle."""
    jax.block_until_ready(job(x))
    begin = time.perf_counter()
    found = jax.block_until_ready(job(x))
    repeats = min(300, max(3, round(0.3 / (time.perf_counter() - begin))))
    begin = time.perf_counter()
    for _ in range(repeats):
        found = job(x)
    jax.block_until_ready(found)
    return flops * repeats / (time.perf_counter() - begin)


@jax.jit
def _product(x: Array) -> Array:
    return x @ x


@jax.jit
def _full_product(x: Array) -> Array:
    return jnp.matmul(x, x, precision=HIGHEST)


@jax.jit
def _cast_moment(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return jnp.einsum("ni,nj->ij", wide, wide, precision=HIGHEST)


@jax.jit
def _moment(x: Array) -> Array:
    options = {"precision": HIGHEST, "preferred_element_type": jnp.float32}
    return jnp.einsum("ni,nj->ij", x, x, **options)


def peak_gib() -> float | None:
    """The most memory of the first device that this process held so far, in GiB.

    None where the device does not say, as a CPU. It never falls: what ran before is in it, the
    matrices of `matmul_rates` among it.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30
