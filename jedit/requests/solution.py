"""One request's edit, block by block: the gradient, the solution, and the cut to a rank.

    gradient  aᵀ g            a (layers, positions, rows), g (layers, positions, d_out)
    solution  Lᵀ R            L = a (A + λ_A)⁻¹,  R = g (G + λ_G)⁻¹
    image     (L A)ᵀ (R G)    by products: a - λ_A L, where a is small beside λ_A L, is all rounding

What is told of an edit are inner products of the three. Everything here runs under `jax.vmap` over
a chunk of requests, which turns a product with a factor into one with the rows of them all.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from jedit.core.devices import fetched, kept
from jedit.core.precision import HIGHEST
from jedit.curvature import Curvature, Factor, Kronecker, eigenvalues, factored, rotate
from jedit.curvature.algebra import is_undecomposed
from jedit.curvature.captured_batch import Pass
from jedit.curvature.checks import matrix_of
from jedit.curvature.layout import BlockSites, group_sites
from jedit.curvature.mesh.placement import whole
from jedit.curvature.squared_gradients import example_factors, example_gradient
from jedit.edits import LowRank, Product, Truncation, as_parameter, truncate_all
from jedit.edits.low_rank import added

# Sites whose gradient for one request is a product of two factors with as many rows as positions;
# of a vector or a lookup the gradient itself is as small.
THIN_KINDS = ("dense", "conv")


class Solution(NamedTuple):
    """One request's edit, and scalars about it that are summed over the blocks."""

    edit: dict[str, Array | LowRank]
    gradient_norm2: Array
    gain: Array
    quadratic: Array
    cut2: Array
    norm2: Array


class _Uncut(NamedTuple):
    """A block's solution that is still to be cut to a rank, of a thin gradient or a whole one."""

    name: str
    held: Kronecker
    gradient: tuple[Array, Array] | Array
    gradient_norm2: Array
    product: Product


def damped_inverses(curvature: Curvature, damping: Array) -> dict[str, Array]:
    """Return (A + λ_A)⁻¹ of every factor, (layers, d, d), or (layers, d) of a diagonal one.

    λ_A is the factor's mean eigenvalue times sqrt(damping): the product λ_A λ_G of a block's two
    factors is then the block's λ. On a mesh every device makes and holds all of them: a request is
    answered on one device, by all of an inverse.
    """
    places = {
        name: whole(block.sharding)
        for block in curvature.blocks.values()
        if isinstance(block, Kronecker) and block.sharding is not None
        for name in (block.input, block.output)
    }
    return {
        name: _inverse(factor, damping, places.get(name))
        for name, factor in curvature.factors.items()
    }


# Compiled once for all factors of one shape, and not once for each in one program of them all.
@functools.partial(jax.jit, static_argnums=2)
def _inverse(factor: Factor, damping: Array, place: NamedSharding | None) -> Array:
    # Whole before it is inverted: the Cholesky factor's slices fit no split over devices.
    factor = jax.tree.map(lambda x: kept(fetched(x), (place,)), factor)
    if factor.form == "undecomposed":
        mean = factored.mean_diagonal(factored.fetched_matrix(factor))
        level = jnp.sqrt(damping).astype(mean.dtype) * mean
        return factored.dense(factored.inverse(factor, level))
    basis, values = factor.basis, factor.eigenvalues
    assert values is not None  # one of leading eigenvectors alone was refused
    level = jnp.sqrt(damping).astype(values.dtype) * jnp.mean(values, 1)
    values = values + level[:, None]
    found = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)
    if basis is None:
        return found
    return jnp.einsum("lia,la,lja->lij", basis, found, basis, precision=HIGHEST)


def all_blocks(
    done: Pass,
    pulled: dict[str, Array],
    curvature: Curvature,
    inverses: dict[str, Array],
    damping: Array,
    exact: bool,
    rank: int | None,
) -> Solution:
    """Return one request's direction d in all blocks, with its sums."""
    zero = jnp.zeros((), done.dtype)
    total = Solution({}, zero, zero, zero, zero, zero)
    whole, cut = [], []
    for block in group_sites(done.captured.sites, done.alignments):
        held = curvature.blocks[block.name]
        thin = None
        if all(m.kind in THIN_KINDS for m in block.members):
            thin = _thin_gradient(done, block, pulled)
        if thin is not None and not exact and isinstance(held, Kronecker):
            # Only factored damping keeps a gradient's rank: dividing by sums of eigenvalues fills
            # the matrix.
            found = _thin_block(thin, block.name, curvature, held, inverses, rank)
        else:
            gradient = _dense_gradient(done, block, pulled) if thin is None else _product(*thin)
            found = _dense_block(
                gradient, curvature, block, inverses, damping, rank if thin is not None else None
            )
        (cut if isinstance(found, _Uncut) else whole).append(found)
    if cut:
        assert rank is not None  # else nothing is cut
        # All at once: by themselves the matrices that are left of a request's blocks are small.
        cuts = truncate_all([one.product for one in cut], rank)
        whole += [_cut_block(*pair, curvature) for pair in zip(cut, cuts, strict=True)]
    for part in whole:
        edit = dict(total.edit)
        for path, change in part.edit.items():
            edit[path] = added(edit[path], change) if path in edit else change
        sums = (x + y.astype(x.dtype) for x, y in zip(total[1:], part[1:], strict=True))
        total = Solution(edit, *sums)
    return total


def _thin_gradient(done: Pass, block: BlockSites, pulled: dict[str, Array]) -> tuple[Array, Array]:
    """Return (a, g) with gradient aᵀg: (layers, positions, rows) and (layers, positions, d_out)."""
    parts = []
    for member in block.members:
        site = done.captured.sites[member.site]
        a, g = example_factors(done, site, member, pulled, (None, None))
        assert g is not None  # a dense or convolutional site has both
        a, g = (x.reshape(len(x), -1, x.shape[-1]) for x in (a, g))
        # A tied matrix that is met transposed has its inputs on the other side.
        parts.append((g, a) if member.is_flipped else (a, g))
    inputs, outputs = zip(*parts, strict=True)
    return jnp.concatenate(inputs, axis=1), jnp.concatenate(outputs, axis=1)


def _product(a: Array, g: Array) -> Array:
    return jnp.einsum("lpi,lpo->lio", a, g, precision=HIGHEST)


def _dense_gradient(done: Pass, block: BlockSites, pulled: dict[str, Array]) -> Array:
    """Return the gradient of a vector or a lookup's table, (layers, rows, d_out)."""
    sites = done.captured.sites
    total = jnp.zeros((), done.dtype)
    for member in block.members:
        site = sites[member.site]
        factors = example_factors(done, site, member, pulled, (None, None))
        by_example = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), factors)
        gradients = jax.vmap(
            lambda part, site=site, member=member: example_gradient(
                part, site, member, (None, None)
            )
        )(by_example)
        total = total + jnp.sum(gradients, axis=0)
    return total


def _times(x: Array, matrix: Array) -> Array:
    """Multiply (layers, positions, d) by a symmetric (layers, d, d), or a diagonal (layers, d)."""
    if matrix.ndim == 2:
        return x * matrix[:, None]
    return jnp.einsum("lpi,lij->lpj", x, matrix, precision=HIGHEST)


def _inner(x: Array, y: Array) -> Array:
    """Return x yᵀ over the last axis, (layers, positions, positions)."""
    return jnp.einsum("lpi,lqi->lpq", x, y, precision=HIGHEST)


def _is_long(a: Array, g: Array) -> bool:
    """Return whether a pair of thin matrices holds more numbers than its product."""
    return a.shape[1] * (a.shape[2] + g.shape[2]) > a.shape[2] * g.shape[2]


def inner_product(one: tuple[Array, Array], other: tuple[Array, Array]) -> Array:
    """Return <aᵀg, bᵀh> of two pairs of thin matrices (layers, positions, features).

    As a sum over pairs of positions, in which neither product is formed; but where a pair holds
    more numbers than its product, of the products themselves, which are then the smaller and the
    quicker way.
    """
    (a, g), (b, h) = one, other
    if _is_long(a, g) or _is_long(b, h):
        return jnp.sum(_product(a, g) * _product(b, h))
    return jnp.sum(_inner(a, b) * _inner(g, h))


def _thin_block(
    thin: tuple[Array, Array],
    name: str,
    curvature: Curvature,
    held: Kronecker,
    inverses: dict[str, Array],
    rank: int | None,
) -> Solution | _Uncut:
    a, g = thin
    left, right = _times(a, inverses[held.input]), _times(g, inverses[held.output])
    norm2 = inner_product(thin, thin)
    lifted = jnp.swapaxes(left, 1, 2)
    if rank is not None and rank < a.shape[1]:
        product = (lifted, right)
        if _is_long(left, right):
            product = (jnp.matmul(lifted, right, precision=HIGHEST), None)
        return _Uncut(name, held, thin, norm2, product)
    gain = inner_product(thin, (left, right))
    quadratic = _thin_quadratic(curvature, held, (left, right))
    zero = jnp.zeros((), a.dtype)
    # The edit's norm is read beside what is cut off alone.
    edit_norm2 = zero if rank is None else inner_product((left, right), (left, right))
    return Solution(_low_rank(held, lifted, right), norm2, gain, quadratic, zero, edit_norm2)


def _cut_block(uncut: _Uncut, cut: Truncation, curvature: Curvature) -> Solution:
    """Return a block's edit of the rank; its gain and its KL are those after the cut."""
    held, pair = uncut.held, (jnp.swapaxes(cut.left, 1, 2), cut.right)
    if isinstance(uncut.gradient, tuple):
        gain = inner_product(uncut.gradient, pair)
        quadratic = _thin_quadratic(curvature, held, pair)
    else:
        step = _product(*pair)
        gain = jnp.sum(uncut.gradient * step)
        quadratic = _quadratic(curvature, uncut.name, step)
    cut2 = jnp.sum(cut.lost2)
    # What is kept and what is cut off are at right angles.
    norm2 = cut2 + jnp.sum(cut.right**2)
    edit = _low_rank(held, cut.left, cut.right)
    return Solution(edit, uncut.gradient_norm2, gain, quadratic, cut2, norm2)


def _low_rank(held: Kronecker, left: Array, right: Array) -> dict[str, Array | LowRank]:
    """Return the parameters' changes of (layers, rows, rank) times (layers, rank, d_out)."""
    weight = held.weight
    found: dict[str, Array | LowRank] = {
        weight.path: LowRank(left[:, : weight.d_in], right, weight.kernel)
    }
    if weight.bias_path is not None:
        row = jnp.matmul(left[:, weight.d_in :], right, precision=HIGHEST)
        found[weight.bias_path] = as_parameter(weight.bias_row, row)
    return found


def _dense_block(
    gradient: Array,
    curvature: Curvature,
    block: BlockSites,
    inverses: dict[str, Array],
    damping: Array,
    rank: int | None,
) -> Solution | _Uncut:
    """Solve in a block whose gradient is whole, with exact damping or a lookup's factored one."""
    held = curvature.blocks[block.name]
    if isinstance(held, Kronecker) and inverses:
        step = jnp.swapaxes(_times(jnp.swapaxes(gradient, 1, 2), inverses[held.input]), 1, 2)
        step = _times(step, inverses[held.output])
    else:
        values = eigenvalues(curvature, block.name)
        mean = jnp.mean(values, axis=(1, 2), keepdims=True)
        damped = values + damping.astype(values.dtype) * mean
        rotated = rotate(curvature, block.name, gradient)
        rotated = jnp.where(damped > 0, rotated / jnp.where(damped > 0, damped, 1), 0)
        step = rotate(curvature, block.name, rotated, back=True)
    norm2 = jnp.sum(gradient**2)
    if rank is not None and isinstance(held, Kronecker):
        return _Uncut(block.name, held, gradient, norm2, (step, None))
    edit: dict[str, Array | LowRank] = dict(held.weight.scatter(step))
    gain, zero = jnp.sum(gradient * step), jnp.zeros((), step.dtype)
    quadratic = _quadratic(curvature, block.name, step)
    return Solution(edit, norm2, gain, quadratic, zero, jnp.sum(step**2))


def _thin_quadratic(curvature: Curvature, held: Kronecker, pair: tuple[Array, Array]) -> Array:
    """Return Tᵀ F T of one block's T = Lᵀ R, of thin matrices (L, R)."""
    A, G = (matrix_of(curvature.factors[f], held.weight.path) for f in (held.input, held.output))
    return inner_product(pair, (_times(pair[0], A), _times(pair[1], G)))


def _quadratic(curvature: Curvature, name: str, step: Array) -> Array:
    """Return Tᵀ F T of one block's matrix."""
    held = curvature.blocks[name]
    if is_undecomposed(held, curvature):
        pair = factored.damped_pair(curvature, held, 0.0, absolute=False)
        moved = factored.multiplied(pair, step, held.sharding)
        return jnp.maximum(jnp.sum(step * moved), 0)
    return jnp.sum(eigenvalues(curvature, name) * rotate(curvature, name, step) ** 2)
