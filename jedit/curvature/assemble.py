"""From K-FAC's sums to the moments of a block: normalise, put the bias in, merge."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jedit.curvature.eigenbases import Moment
from jedit.curvature.layout import BlockSites, Member
from jedit.curvature.moments import InputSums
from jedit.curvature.sketch import Sketch, Sketched, input_sketch, output_sketch, weighted_sum
from jedit.curvature.types import Kronecker


class Totals(NamedTuple):
    """The sums that centred moments are made with.

    Attributes:
        gradients: by site, Σ g (layers, d_out).
        draws: how many draws of labels are in the sums.
    """

    gradients: Mapping[str, Array]
    draws: int


class Sums(NamedTuple):
    """The sums that all blocks are made of.

    Attributes:
        inputs: sums over inputs, by input group.
        outputs: sums over output gradients, by site.
        number: M times the draws, what G is a mean over.
        starts: what sketches' columns begin with, by input group and by site.
        totals: of centred moments; None: they are about zero.
    """

    inputs: Mapping[str, InputSums]
    outputs: Mapping[str, Array | Sketch]
    number: Array
    starts: tuple[Mapping[str, Array], Mapping[str, Array]]
    totals: Totals | None = None


def assemble(
    block: BlockSites,
    sums: Sums,
    moments: dict[str, Moment],
    sharding: NamedSharding | None = None,
) -> Kronecker:
    """Make one block, and add its moments to `moments` unless another block has put A there.

    Args:
        block: the block's parameters and sites.
        sums: all blocks' sums.
        moments: all moments made so far, by the factor's name; it is added to.
        sharding: how the block's parameter lies on a mesh; None: on one device.

    Returns:
        The block, which names its two factors.
    """
    has_bias = block.weight.bias_path is not None
    pairs = []
    for member in block.members:
        a, g = _input_of(member, sums, has_bias), _output_of(member, sums)
        pairs.append((g, a) if member.is_flipped else (a, g))
    if len(pairs) == 1:
        member, (a, g) = block.members[0], pairs[0]
        # Blocks that read one activation, in the same way, share its factor.
        bias = f", bias {member.bias_scale}" if has_bias else ""
        input_name = f"input {member.group}, scale {member.scale}{bias}"
    else:
        a, g = merge(pairs)
        input_name = f"input of {block.name}"
    output_name = f"output of {block.name}"
    moments.setdefault(input_name, Moment(a, block.name, block.hint))
    moments[output_name] = Moment(g, block.name, block.hint)
    return Kronecker(
        block.weight, input_name, output_name, sharding=sharding, is_merged=len(pairs) > 1
    )


def _input_of(member: Member, sums: Sums, has_bias: bool) -> Array | Sketched:
    """Return A of one site."""
    entering, bias_scale = sums.inputs[member.group], member.bias_scale if has_bias else None
    how = member.scale, bias_scale, sums.totals is not None
    if not isinstance(entering.moment, Sketch):
        return _input_moment(entering, *how)
    count = jnp.maximum(entering.count, 1).astype(entering.total.dtype)
    start = sums.starts[0].get(member.group)
    return input_sketch(entering.moment, entering.total, count, start, *how)


def _output_of(member: Member, sums: Sums) -> Array | Sketched:
    """Return G of one site."""
    outputs, total, count = sums.outputs[member.site], None, None
    if sums.totals is not None:
        total = sums.totals.gradients[member.site]
        count = sums.inputs[member.group].count * sums.totals.draws
    if isinstance(outputs, Sketch):
        return output_sketch(outputs, sums.number, sums.starts[1].get(member.site), total, count)
    g = _output_moment(outputs, sums.number)
    if total is None or count is None:
        return g
    return _less_mean(g, total, sums.number, count)


# Compiled once for blocks of equal shape, of which a model has many.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _input_moment(
    sums: InputSums, scale: float, bias_scale: float | None, is_centred: bool
) -> Array:
    """Return A of one site; with a bias, the last coordinate of every a is `bias_scale`.

    Centred, it has no moment there: a constant does not vary.
    """
    moment = sums.moment
    assert not isinstance(moment, Sketch)  # for which is `input_sketch`
    count = jnp.maximum(sums.count, 1).astype(moment.dtype)[:, None]
    count_of = count
    if moment.ndim == 3:
        moment, count_of = _symmetrized(moment), count[..., None]
    moment = moment / count_of * scale**2
    if is_centred:
        if sums.total.size:  # a table's rows are one-hot: its counts are left as they are
            mean = sums.total / count * scale
            square = mean**2 if moment.ndim == 2 else mean[:, :, None] * mean[:, None, :]
            moment = moment - square
        bias = ((0, 0), *[(0, 0 if bias_scale is None else 1)] * (moment.ndim - 1))
        return jnp.pad(moment, bias)
    if bias_scale is None:
        return moment
    one = jnp.full_like(count, bias_scale**2)
    if moment.ndim == 2:
        return jnp.concatenate([moment, one], axis=1)
    mean = sums.total / count * (scale * bias_scale)
    last = jnp.concatenate([mean, one], axis=1)
    moment = jnp.concatenate([moment, mean[:, None]], axis=1)
    return jnp.concatenate([moment, last[..., None]], axis=2)


@jax.jit
def _output_moment(total: Array, number: Array) -> Array:
    """Return G of one site."""
    mean = total / number.astype(total.dtype)
    return _symmetrized(mean) if mean.ndim == 3 else mean


@jax.jit
def _less_mean(g: Array, total: Array, number: Array, count: Array) -> Array:
    """Return G less the mean's square: (1/M) (Σ g gᵀ - (Σ g)(Σ g)ᵀ / T), T = `count` positions."""
    spread = (-1, *(1,) * (g.ndim - 1))
    square = total**2 if g.ndim == 2 else total[:, :, None] * total[:, None, :]
    each = jnp.maximum(count, 1).astype(g.dtype).reshape(spread) * number.astype(g.dtype)
    return g - square / each


@jax.jit
def merge(
    pairs: list[tuple[Array | Sketched, Array | Sketched]],
) -> tuple[Array | Sketched, Array | Sketched]:
    """Return the Kronecker product that has the partial traces of a sum of Kronecker products.

    A = Σ_k A_k tr G_k / t and G = Σ_k G_k tr A_k, with t = Σ_k tr A_k tr G_k: its trace is the
    sum's. Cross terms between the sites are left out, as between the positions of one site.
    """
    traces = [(_trace(a), _trace(g)) for a, g in pairs]
    whole = sum(a * g for a, g in traces)
    whole = jnp.where(whole > 0, whole, 1)
    a = _weighted_sum([a for a, _ in pairs], [g / whole for _, g in traces])
    g = _weighted_sum([g for _, g in pairs], [a for a, _ in traces])
    return a, g


def _trace(matrix: Array | Sketched) -> Array:
    if isinstance(matrix, Sketched):
        return matrix.trace
    diagonal = matrix if matrix.ndim == 2 else jnp.diagonal(matrix, axis1=1, axis2=2)
    return jnp.sum(diagonal, axis=-1)


def _weighted_sum(matrices: list[Array | Sketched], weights: list[Array]) -> Array | Sketched:
    """Return a weighted sum: sketched or dense if one of them is, else diagonal (layers, d)."""
    plain = [m for m in matrices if not isinstance(m, Sketched)]
    if len(plain) < len(matrices):
        return weighted_sum(matrices, weights)
    return _weighted_plain(plain, weights)


def _weighted_plain(matrices: list[Array], weights: list[Array]) -> Array:
    if any(m.ndim == 3 for m in matrices):
        eye = jnp.eye(matrices[0].shape[1], dtype=matrices[0].dtype)[None]
        matrices = [m if m.ndim == 3 else m[..., None] * eye for m in matrices]
    spread = (-1, *(1,) * (matrices[0].ndim - 1))
    weighted = [m * w.reshape(spread) for m, w in zip(matrices, weights, strict=True)]
    return functools.reduce(jnp.add, weighted)


def _symmetrized(total: Float[Array, "layers d d"]) -> Float[Array, "layers d d"]:
    """Return the whole matrix, of which `kernels.moment` sums the lower triangle."""
    lower = jnp.tril(total, -1)
    diagonal = jnp.diagonal(total, axis1=-2, axis2=-1)
    eye = jnp.eye(total.shape[-1], dtype=total.dtype)
    return lower + jnp.swapaxes(lower, -1, -2) + diagonal[..., None] * eye[None]
