"""Moments that are never formed: their image of a few columns, summed over data in one pass.

    Y = Σ x (xᵀ Ω),  t = Σ xᵀ x        Ω (d, m), m = 2k + 8, the same for all data
    B = Ωᵀ (Y + ν Ω) = V diag(b) Vᵀ    ν = √d ε ‖Y‖ keeps rounding from making b negative
    E = (Y + ν Ω) V diag(b)^(-1/2)     so that E Eᵀ is Nyström's approximation of the moment
    E = U diag(s) Wᵀ,  a = s² - ν      eigenvectors U and eigenvalues; the last k are kept

Source: Tropp, Yurtsever, Udell & Cevher (2017), algorithm 3 (fixed-rank approximation of a positive
semi-definite matrix from a sketch) [paper]. Difference: the root of B is by its eigenvectors, of
which those at rounding's height are dropped, and not by Cholesky's factor, which does not exist
when float32's sums make B indefinite, or when a column of Ω is zero.

Everything is linear in Y and t, so sums over disjoint data merge by adding, and so do the weights
of a block's sites, the means of centred moments and the scale of a parameter. A bias's coordinate
needs no sum: its column of the moment is the mean of the inputs, which is held in any case; Ω gets
one column for it. Ω is drawn anew from a fixed key wherever it is needed, or begins with an earlier
curvature's eigenvectors: then the pass is a step of orthogonal iteration over the data.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jedit.core.devices import no_mesh, sharding_of
from jedit.core.display import short_repr
from jedit.core.precision import HIGHEST
from jedit.curvature.factorization import Factorize
from jedit.curvature.subspace import (
    as_factor,
    num_columns,
    on_one_device,
    starting_columns,
    with_rest,
)
from jedit.curvature.types import Factor


class Sketch(NamedTuple):
    """Running sums that stand for a moment's.

    Attributes:
        image: Y = Σ x (xᵀ Ω), (layers, d, m).
        trace: Σ xᵀ x, (layers,).
    """

    image: Array
    trace: Array

    __repr__ = short_repr


class Sketched(NamedTuple):
    """A moment A as its image, normalised and with the bias's coordinate.

    Attributes:
        image: A Ω, (layers, d, m).
        trace: of A, (layers,).
        test: Ω, (layers or 1, d, m).
    """

    image: Array
    trace: Array
    test: Array

    @property
    def ndim(self) -> int:
        """Return the number of axes of its image, three as those of a dense moment."""
        return self.image.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the moment that it stands for."""
        layers, d, _ = self.image.shape
        return (layers, d, d)


def is_sketched(how: Factorize, d: int) -> bool:
    """Say whether a moment of this side is sketched, which it is where that is smaller."""
    is_kept_whole = how.by == "auto" and d <= how.eigh_dim
    return how.streamed and how.rank is not None and num_columns(how.rank) < d and not is_kept_whole


def zero_sketch(layers: int, d: int, dtype: jnp.dtype, how: Factorize) -> Sketch:
    """Return zero sums."""
    assert how.rank is not None  # what is streamed has one
    image = jnp.zeros((layers, d, num_columns(how.rank)), dtype)
    return Sketch(image, jnp.zeros((layers,), dtype))


def add_rows(
    sums: Sketch, rows: Float[Array, "layers n d"], start: Float[Array, "_ d _k"] | None
) -> Sketch:
    """Add rows x, which may be narrower than the sums; 4 n d m flops."""
    rows = rows.astype(sums.image.dtype)
    seen = jnp.matmul(rows, image_columns(sums.image, start), precision=HIGHEST)
    image = jnp.einsum("lnd,lnm->ldm", rows, seen, precision=HIGHEST)
    return Sketch(sums.image + image, sums.trace + jnp.sum(jnp.square(rows), axis=(1, 2)))


def image_columns(
    image: Float[Array, "layers d m"], start: Float[Array, "_ d _k"] | None
) -> Float[Array, "_ d m"]:
    """Return the Ω that an image is of, one for all layers where it is random."""
    _, d, m = image.shape
    found = starting_columns(d, m, image.dtype, start)
    return found[None] if found.ndim == 2 else found


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def input_sketch(
    sums: Sketch,
    total: Float[Array, "layers d"],
    count: Float[Array, " layers"],
    start: Float[Array, "_ d _k"] | None,
    scale: float,
    bias_scale: float | None,
    is_centred: bool,
) -> Sketched:
    """Return A of one site; see `assemble` for the scales and for what is centred."""
    image, trace = sums.image / count[:, None, None] * scale**2, sums.trace / count * scale**2
    test = image_columns(image, start)
    mean = total / count[:, None] * scale
    seen = jnp.matmul(mean[:, None], test, precision=HIGHEST)  # (layers, 1, m)
    if is_centred:
        image = image - mean[:, :, None] * seen
        trace = trace - jnp.sum(mean**2, axis=1)
        below = ((0, 0), (0, 0 if bias_scale is None else 1), (0, 0))
        return Sketched(jnp.pad(image, below), trace, jnp.pad(test, below))
    if bias_scale is None:
        return Sketched(image, trace, test)
    corner = jnp.full((len(image), 1, 1), bias_scale**2, image.dtype)
    above = jnp.concatenate([image, bias_scale * mean[:, :, None]], axis=2)
    below = jnp.concatenate([bias_scale * seen, corner], axis=2)
    test = jnp.pad(test, ((0, 0), (0, 1), (0, 1))).at[:, -1, -1].set(1)
    image = jnp.concatenate([above, below], axis=1)
    return Sketched(image, trace + bias_scale**2, test)


@jax.jit
def output_sketch(
    sums: Sketch,
    number: Array,
    start: Float[Array, "_ d _k"] | None,
    total: Float[Array, "layers d"] | None,
    count: Array | None,
) -> Sketched:
    """Return G of one site, less the mean's square where a total of gradients is given."""
    number = number.astype(sums.image.dtype)
    image, trace = sums.image / number, sums.trace / number
    test = image_columns(image, start)
    if total is not None:
        assert count is not None  # of as many positions as the total is of
        each = jnp.maximum(count, 1).astype(image.dtype) * number
        seen = jnp.matmul(total[:, None], test, precision=HIGHEST)
        image = image - total[:, :, None] * seen / each[:, None, None]
        trace = trace - jnp.sum(total**2, axis=1) / each
    return Sketched(image, trace, test)


def weighted_sum(moments: list[Array | Sketched], weights: list[Array]) -> Sketched:
    """Return the sum of sketched and diagonal (layers, d) moments, each times a weight a layer."""
    test = next(m.test for m in moments if isinstance(m, Sketched))
    images, traces = [], []
    for moment in moments:
        if isinstance(moment, Sketched):
            images.append(moment.image)
            traces.append(moment.trace)
        else:
            images.append(moment[:, :, None] * test)
            traces.append(jnp.sum(moment, axis=1))
    image = [x * w[:, None, None] for x, w in zip(images, weights, strict=True)]
    trace = [x * w for x, w in zip(traces, weights, strict=True)]
    return Sketched(functools.reduce(jnp.add, image), functools.reduce(jnp.add, trace), test)


def nystrom(moment: Sketched, rank: int) -> Factor:
    """Return the factor of a sketched moment's leading eigenvectors, made on one device."""
    image, trace = on_one_device(moment.image), on_one_device(moment.trace)
    test = on_one_device(moment.test)
    found = []
    with no_mesh():
        for layer in range(len(image)):
            one = _nystrom(image[layer], test[min(layer, len(test) - 1)])
            found.append(with_rest(*one, trace[layer], rank))
    return as_factor(found, sharding_of(moment.image))


def _nystrom(image: Float[Array, "d m"], test: Float[Array, "d m"]) -> tuple[Array, Array]:
    """Return (m eigenvalues, ascending; eigenvectors in columns)."""
    shift = _shift(image)
    b, v = jax.block_until_ready(jnp.linalg.eigh(_core(image, test, shift)))
    half = jax.block_until_ready(jnp.linalg.qr(_half(image, test, shift, b, v)))
    u, s, _ = jax.block_until_ready(jnp.linalg.svd(half[1]))
    vectors = jnp.matmul(half[0], u, precision=HIGHEST)
    return jnp.maximum(s**2 - shift, 0)[::-1], vectors[:, ::-1]


@jax.jit
def _shift(image: Array) -> Array:
    epsilon = jnp.finfo(image.dtype).eps
    return jnp.sqrt(image.size / image.shape[1]).astype(image.dtype) * epsilon * _norm(image)


def _norm(x: Array) -> Array:
    most = jnp.max(jnp.abs(x))
    most = jnp.where(most > 0, most, 1)
    return most * jnp.sqrt(jnp.sum((x / most) ** 2))


@jax.jit
def _core(image: Array, test: Array, shift: Array) -> Array:
    b = jnp.matmul(test.T, image + shift * test, precision=HIGHEST)
    return (b + b.T) / 2


@jax.jit
def _half(image: Array, test: Array, shift: Array, b: Array, v: Array) -> Array:
    """Return E; directions in which B is nothing but rounding are zero."""
    least = b[-1] * len(b) * jnp.finfo(b.dtype).eps
    is_known = b > jnp.maximum(least, 0)
    root = jnp.where(is_known, jax.lax.rsqrt(jnp.where(is_known, b, 1)), 0)
    return jnp.matmul(image + shift * test, v * root[None], precision=HIGHEST)
