"""What one batch adds to K-FAC's sums: moments of a site's inputs and of its output gradients.

Sharing over the S valid positions of an example n, a and g as in `scores`:

    expand    Σ_ns a aᵀ over every position                       Σ_ns g gᵀ
    reduce    Σ_n ā āᵀ, ā = (1/S) Σ_s a                           Σ_n ĝ ĝᵀ, ĝ = Σ_s g
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit.core.display import short_repr
from jedit.curvature.captured_batch import Pass
from jedit.curvature.factorization import Factorize
from jedit.curvature.kernels import moment as add_moment
from jedit.curvature.positions import Alignment
from jedit.curvature.sketch import Sketch, add_rows, is_sketched, zero_sketch
from jedit.tracing import Site
from jedit.tracing.pullback import scatter_rows

Sharing = Literal["expand", "reduce"]


class InputSums(NamedTuple):
    """Running sums over the activations that enter a site.

    Attributes:
        moment: Σ a aᵀ (layers, d_in, d_in), of which the lower block triangle counts; its
            diagonal (layers, d_in); or its sketch.
        total: Σ a (layers, d_in), the bias's off-diagonal part of A; zero-sized for an embedding.
        count: how many a were summed, (layers,), int32.
    """

    moment: Array | Sketch
    total: Array
    count: Array

    __repr__ = short_repr


def zero_input_sums(site: Site, dtype: jnp.dtype, how: Factorize) -> InputSums:
    """Return zero sums; the moment is diagonal for an embedding, or a d_in above `max_dim`."""
    layers, d = site.weight.layers, site.weight.d_in
    return InputSums(
        _zero_moment(layers, d, dtype, how, is_diagonal=site.kind == "embedding"),
        jnp.zeros((layers, 0 if site.kind == "embedding" else d), dtype),
        jnp.zeros((layers,), jnp.int32),
    )


def zero_output_sums(site: Site, dtype: jnp.dtype, how: Factorize) -> Array | Sketch:
    """Return a zero (layers, d_out, d_out), its sketch, or a diagonal for d_out > `max_dim`."""
    return _zero_moment(site.weight.layers, site.weight.d_out, dtype, how)


def _zero_moment(
    layers: int, d: int, dtype: jnp.dtype, how: Factorize, *, is_diagonal: bool = False
) -> Array | Sketch:
    if is_diagonal or d > how.max_dim:
        return jnp.zeros((layers, d), dtype)
    if is_sketched(how, d):
        return zero_sketch(layers, d, dtype, how)
    return jnp.zeros((layers, d, d), dtype)


def check_sharing(sharing: Sharing, site: Site, alignment: Alignment) -> None:
    """Refuse to reduce over the positions of examples that cannot be told apart.

    Raises:
        ValueError: the site has no axis of examples.
    """
    number = alignment.lead[0]
    if sharing == "reduce" and alignment.example is None and number > 1:
        raise ValueError(
            f'sharing="reduce" averages over the positions of each example, but {site.name} '
            f"({site.source}) has no axis of the batch's {number} examples; leave the parameter "
            'out by `select`, or use "expand"'
        )


def add_inputs(
    sums: InputSums, done: Pass, site: Site, sharing: Sharing, start: Array | None = None
) -> InputSums:
    """Add a batch's inputs of one site; `start` is what the columns of a sketch begin with."""
    a, v = done.inputs(site)
    if site.kind == "embedding":
        moment, count = _token_moment(site, a, v, done.dtype, sharing)
        # One-hot rows need no product: their moment is diagonal, and counts tokens.
        assert not isinstance(sums.moment, Sketch)  # that of one-hot rows is a diagonal
        moment = sums.moment + moment
        total = sums.total
    else:
        if sharing == "reduce":
            a, v = _mean_over_positions(a.astype(done.dtype), v)
        rows = a.reshape(a.shape[0], -1, a.shape[-1])
        # The sum is over wide numbers; the product takes narrow rows, and sums wide itself.
        wide = rows.astype(done.dtype)
        total, count = sums.total + jnp.sum(wide, axis=1), _count(a, v)
        moment = _added(sums.moment, rows, done.dtype, start)
    moment = jax.tree.map(lambda x: x + done.poison(site), moment)
    return InputSums(moment, total, sums.count + count)


def add_outputs(
    total: Array | Sketch,
    done: Pass,
    site: Site,
    pulled: dict[str, Array],
    sharing: Sharing,
    start: Array | None = None,
) -> Array | Sketch:
    """Add the output gradients of one pullback; `start` as for `add_inputs`."""
    g = done.gradients(site, pulled)
    if sharing == "reduce":
        # The sum, not a mean: the weight's gradient is Σ_s a gᵀ, which is ā ĝᵀ if all a agree.
        g = jnp.sum(g.astype(done.dtype), axis=2)
    return _added(total, g.reshape(g.shape[0], -1, g.shape[-1]), done.dtype, start)


def _added(
    moment: Array | Sketch, rows: Array, dtype: jnp.dtype, start: Array | None
) -> Array | Sketch:
    """Add the products of rows (layers, n, d) to a moment, in whichever form it is summed."""
    if isinstance(moment, Sketch):
        return add_rows(moment, rows, start)
    if moment.ndim == 2:
        return moment + jnp.sum(jnp.square(rows.astype(dtype)), axis=1)
    return add_moment(moment, rows)


def add_output_totals(total: Array, done: Pass, site: Site, pulled: dict[str, Array]) -> Array:
    """Add the sum Σ g over all positions, of which centred moments know the mean."""
    g = done.gradients(site, pulled).astype(done.dtype)
    return total + jnp.sum(g.reshape(g.shape[0], -1, g.shape[-1]), axis=1)


def _count(a: Array, v: Array | None) -> Array:
    """Return how many positions of (layers, examples, positions, ...) are data, for each layer."""
    layers, examples, positions = a.shape[:3]
    if v is None:
        return jnp.full((layers,), examples * positions, jnp.int32)
    return jnp.broadcast_to(jnp.sum(v, axis=(1, 2), dtype=jnp.int32), (layers,))


def _num_valid(x: Array, v: Array | None, dtype: jnp.dtype) -> Array:
    """Return how many positions each example of `x` has, (layers or 1, examples), at least one."""
    if v is None:
        return jnp.full((1, x.shape[1]), x.shape[2], dtype)
    # One at least, to divide by; an example without data is dropped by its mask, not by this.
    return jnp.maximum(jnp.sum(v, axis=2, dtype=jnp.int32), 1).astype(dtype)


def _mean_over_positions(a: Array, v: Array | None) -> tuple[Array, Array | None]:
    """Return ā as the one position of each example; an example without data has none."""
    number = _num_valid(a, v, a.dtype)[:, :, None, None]
    mean = jnp.sum(a, axis=2, keepdims=True) / number  # `inputs` has set padding to zero
    return mean, None if v is None else jnp.any(v, axis=2, keepdims=True)


def _token_moment(
    site: Site, indices: Array, v: Array | None, dtype: jnp.dtype, sharing: Sharing
) -> tuple[Array, Array]:
    """Return the diagonal moment of one-hot rows, and how many rows were summed.

    It holds tokens' frequencies, or with "reduce" the sums of their squares by example.
    """
    layers, examples, _ = indices.shape
    ones = jnp.ones(indices.shape, dtype)
    ones = ones if v is None else jnp.where(v, ones, 0)
    add_tokens = jax.vmap(lambda i, x: scatter_rows(site, i, x)[:, 0])
    if sharing == "expand":
        flat = indices.reshape(layers, -1), ones.reshape(layers, -1, 1)
        return add_tokens(*flat), _count(indices, v)
    weights = ones / _num_valid(indices, v, dtype)[:, :, None]

    # One example a step: the square is of an example's whole frequencies, and those of all examples
    # would be (examples, vocabulary) at once.
    def example(total, one):
        index, weight = one
        return total + jnp.square(add_tokens(index, weight[..., None])), None

    zero = jnp.zeros((layers, site.weight.d_in), dtype)
    by_example = jnp.moveaxis(indices, 1, 0), jnp.moveaxis(weights, 1, 0)
    moment = jax.lax.scan(example, zero, by_example)[0]
    is_data = jnp.ones((layers, examples, 1), bool) if v is None else jnp.any(v, 2, keepdims=True)
    return moment, _count(indices[:, :, :1], is_data)
