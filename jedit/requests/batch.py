"""Many requests in one compiled call: a stack of edits, each the answer to one of them.

    d_r = (F + λ)⁻¹ g_r        g_r the gradient of request r's loss, to be raised
    Δ_r = α_r d_r              α_r such that ½ Δ_rᵀ F Δ_r is `predicted_kl`, or one

A request of n positions has g_r = Σ_n a_n g_nᵀ at a site: rank n. Factored damping,

    (A + λ_A)⁻¹ ⊗ (G + λ_G)⁻¹,   λ_A λ_G = λ,   λ_A / λ_G = mean(a) / mean(g)

(Martens & Grosse 2015) keeps that rank, so an edit is two thin matrices, and nothing larger than
these is formed for a request. Exact damping, 1 / (a_i g_j + λ), does not keep it: there
the edits are formed one chunk of requests at a time, and cut down to `rank` at once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_batch, check_function, check_kind, check_params
from jedit.core.batch import Batch
from jedit.core.checks import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    check_numbers,
    culprit,
    rows_not_finite,
)
from jedit.core.devices import on_auto_axes, row_sharding
from jedit.core.display import short_repr
from jedit.core.paths import exactly
from jedit.core.precision import HIGHEST, exponents, shifted, wide
from jedit.curvature import Curvature, Factor, Kronecker, eigenvalues, factored, rotate, to_device
from jedit.curvature.algebra import is_undecomposed
from jedit.curvature.captured_batch import Examples, Labels, Pass, run_pass
from jedit.curvature.checks import (
    check_counted,
    check_covers,
    check_decomposed,
    check_has_matrices,
    eigenbasis_of,
    matrix_of,
)
from jedit.curvature.inverted import check_invertible
from jedit.curvature.layout import BlockSites, group_sites
from jedit.curvature.likelihoods import Categorical, Likelihood, check_likelihood
from jedit.curvature.mesh.placement import off_axes
from jedit.curvature.squared_gradients import example_factors, example_gradient
from jedit.edits import Edit, LowRank, as_parameter, truncate
from jedit.edits.low_rank import added
from jedit.methods._entrance import check_requests, refuse_zero_gradients

# Sites whose gradient for one request is a product of two factors with as many rows as positions;
# of a vector or a lookup the gradient itself is as small.
THIN_KINDS = ("dense", "conv")


class BatchInfo(NamedTuple):
    """Measurements of a stack of R edits, one for each request, arrays of shape (R,).

    Attributes:
        loss: the request's loss before the edit, nats per counted output.
        gradient_norm: ‖g‖ over the covered parameters.
        step_size: the step size α of the request's edit.
        predicted_gain: gᵀΔ, by which the loss rises to first order.
        predicted_kl: ½ ΔᵀFΔ, nats per counted retain output, by the curvature.
        cut_off: norm of what the truncation to `rank` took away, over the edit's norm.
    """

    loss: Float[Array, " requests"]
    gradient_norm: Float[Array, " requests"]
    step_size: Float[Array, " requests"]
    predicted_gain: Float[Array, " requests"]
    predicted_kl: Float[Array, " requests"]
    cut_off: Float[Array, " requests"]

    __repr__ = short_repr


@dataclasses.dataclass(frozen=True)
class Solver:
    """Settings by which a stack of edits is solved for: the damping's form, the rank, the chunks.

    Attributes:
        exact: True damps the products of eigenvalues, and not the factors, which False does; it
            needs all eigenvectors, and a `rank` to be thin. An EK-FAC curvature's corrected
            eigenvalues are only used here.
        rank: rank of each matrix's change, at most; None: as many as a request has positions.
        chunk: number of requests computed at a time, on each device; 16 is arbitrary.
    """

    exact: bool = False
    rank: int | None = None
    chunk: int = 16

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, rank=self.rank, chunk=self.chunk)


@on_auto_axes
def batch_unlearn(
    apply: Callable,
    params: PyTree,
    curvature: Curvature,
    requests: Batch,
    *,
    predicted_kl: float | Array | None = None,
    damping: float = 0.1,
    likelihood: Likelihood = Categorical(),  # noqa: B008 - frozen and hashable
    solver: Solver = Solver(),  # noqa: B008 - frozen and hashable
) -> tuple[Edit, BatchInfo]:
    """Make one edit for each of many requests, by one step of K-FADE each.

    Compiles once for a number of requests and their shape. Beside the result it holds activations
    of the solver's `chunk` requests.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`.
        params: the trained parameters.
        curvature: curvature of the retain outputs at `params`; only what it covers is edited. One
            with leading eigenvectors alone does not serve.
        requests: every leaf (R, rows, ...): R forget sets of one shape; see `stack_requests`. Where
            R is split over the devices of a mesh, each answers its own and holds their edits.
        predicted_kl: retain KL that each edit costs by the quadratic model, nats per counted
            output: one for all, or (R,). None: α = 1, the natural step itself; `0.1 * edits` are
            those of α = 0.1.
        damping: λ over each block's mean eigenvalue; 0.1 is arbitrary.
        likelihood: the likelihood of the outputs.
        solver: the form of the damping and of the edits, and how many are solved for at a time.

    Returns:
        The stack: `LowRank` blocks with R in front for matrices; arrays (R, ...) for vectors and
        embeddings, and for matrices when `exact` without a rank. And what was done.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number out of its range, or no damping where factors have no eigenvectors and
            are inverted; requests without targets or that count no output, masks or labels that are
            none; a curvature of no outputs, of other parameters, or without what the solver needs
            of it; or a request whose gradient is zero.
        FloatingPointError: an edit is not finite; its request is named.
    """
    check_numbers(POSITIVE, predicted_kl=predicted_kl)
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_kind(solver, Solver, "solver", "such as Solver(rank=8)")
    check_function(apply)
    check_params(params)
    check_batch(requests, "requests")
    check_covers(curvature, params)
    if solver.exact:
        check_decomposed(curvature)
    else:
        check_has_matrices(curvature)
        check_invertible(curvature, damping)
    check_likelihood(likelihood)
    if requests.targets is None:
        raise ValueError("the requests need targets: a request is to raise their loss")
    check_requests(apply, likelihood, params, requests)
    check_counted(curvature.num_outputs)
    over = row_sharding(requests)
    if over is not None:
        curvature = off_axes(curvature, over.axes)
    edits, info = _batch_unlearn(
        apply,
        params,
        requests,
        curvature,
        None if predicted_kl is None else jnp.asarray(predicted_kl, float),
        jnp.asarray(damping, float),
        likelihood=likelihood,
        solver=solver,
        over=over,
    )
    # What is not finite in an edit is not finite in its sums either.
    if numbers := rows_not_finite(info):
        raise FloatingPointError(
            f"the edits of requests {numbers[:8]} are not finite: "
            + culprit(params, {"requests": requests})
        )
    refuse_zero_gradients(info.gradient_norm, "requests")
    return edits, info


class _Blocks(NamedTuple):
    """One request's edit, and scalars about it that are summed over the blocks."""

    edit: dict[str, Array | LowRank]
    gradient_norm2: Array
    gain: Array
    quadratic: Array
    cut2: Array
    norm2: Array


@functools.partial(
    jax.jit,
    static_argnames=("apply", "likelihood", "solver", "over"),
)
def _batch_unlearn(
    apply,
    params,
    requests,
    curvature,
    predicted_kl,
    damping,
    *,
    likelihood,
    solver,
    over,
):
    # Labels are the given ones ("empirical"): the key of a pass is then never looked at.
    select, curvature = exactly(curvature.covered), to_device(curvature)
    labels = Labels(likelihood, "empirical")
    inverses = {} if solver.exact else _inverses(curvature, damping)
    num_requests = jax.tree.leaves(requests)[0].shape[0]
    prices = None
    if predicted_kl is not None:
        prices = jnp.broadcast_to(predicted_kl, (num_requests,))

    def one(given):
        request, price = given
        zero = jnp.zeros((), jnp.int32)
        done = run_pass(apply, labels, params, request, jax.random.key(0), Examples(zero), select)
        number = jnp.maximum(done.num_outputs, 1).astype(done.dtype)
        nll = likelihood.nll(done.captured.outputs, request.targets)
        loss = jnp.sum(jnp.where(done.counted, nll, 0)).astype(done.dtype) / number
        pulled = {}
        for k in range(done.num_pullbacks):
            found = jax.tree.map(wide, done.captured.pullback(done.cotangent(k)))
            pulled = {n: pulled[n] + g if n in pulled else g for n, g in found.items()}
        # Pullbacks are summed over outputs: divided here, once, they are those of the mean loss.
        pulled = {name: g / number.astype(g.dtype) for name, g in pulled.items()}
        # By a power of two to entries of about one: a request that is known well has small ones,
        # and their squares would be zero.
        n = exponents(pulled)
        pulled = shifted(pulled, jax.tree.map(jnp.negative, n))
        n = next(iter(n.values()))
        blocks = _all_blocks(done, pulled, curvature, inverses, damping, solver.exact, solver.rank)
        quadratic = jnp.where(blocks.quadratic > 0, blocks.quadratic, 1)
        if price is None:
            # The natural step in units of the scaled gradient: α = 1 of the true one.
            alpha = jnp.ldexp(jnp.ones((), float), n)
        else:
            alpha = jnp.sqrt(2 * price / quadratic)
        alpha = jnp.where(blocks.quadratic > 0, alpha, 0).astype(done.dtype)
        edit = Edit(blocks.edit) * alpha
        whole = jnp.where(blocks.norm2 > 0, blocks.norm2, 1)
        info = BatchInfo(
            # What is linear in the scaled gradient is scaled back; KL is not, since α stands in it
            # too.
            loss,
            jnp.ldexp(jnp.sqrt(blocks.gradient_norm2), n),
            jnp.ldexp(alpha, -n),
            jnp.ldexp(alpha * blocks.gain, n),
            0.5 * alpha**2 * blocks.quadratic,
            jnp.sqrt(blocks.cut2 / whole),
        )
        return edit, info

    if over is None:
        return jax.lax.map(one, (requests, prices), batch_size=min(solver.chunk, num_requests))
    # A loop over a split axis would fetch every chunk from one device: devices stay an axis of
    # their own, behind the loop's.
    number = num_requests // over.num_devices_along

    def side_by_side(x):
        x = x.reshape(over.num_devices_along, number, *x.shape[1:])
        return jax.lax.with_sharding_constraint(jnp.swapaxes(x, 0, 1), over.at(1))

    def in_a_row(x):
        x = jax.lax.with_sharding_constraint(jnp.swapaxes(x, 0, 1), over.at(0))
        x = x.reshape(num_requests, *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, over.at(0))

    given = jax.tree.map(side_by_side, (requests, prices))
    found = jax.lax.map(jax.vmap(one), given, batch_size=min(solver.chunk, number))
    return jax.tree.map(in_a_row, found)


def _inverses(curvature: Curvature, damping: Array) -> dict[str, Array]:
    """Return (A + λ_A)⁻¹ of every factor, (layers, d, d), or (layers, d) of a diagonal one.

    λ_A is the factor's mean eigenvalue times sqrt(damping): the product λ_A λ_G of a block's two
    factors is then the block's λ.
    """
    return {name: _inverse(factor, name, damping) for name, factor in curvature.factors.items()}


def _inverse(factor: Factor, name: str, damping: Array) -> Array:
    if factor.form == "undecomposed":
        mean = factored.mean_diagonal(factored.fetched_matrix(factor))
        return factored.dense(factored.inverse(factor, jnp.sqrt(damping).astype(mean.dtype) * mean))
    basis, values = eigenbasis_of(factor, name)
    values = values + jnp.sqrt(damping).astype(values.dtype) * jnp.mean(values, 1, keepdims=True)
    found = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)
    if basis is None:
        return found
    return jnp.einsum("lia,la,lja->lij", basis, found, basis, precision=HIGHEST)


def _all_blocks(
    done: Pass,
    pulled: dict[str, Array],
    curvature: Curvature,
    inverses: dict[str, Array],
    damping: Array,
    exact: bool,
    rank: int | None,
) -> _Blocks:
    """Return one request's direction d in all blocks, with its sums."""
    zero = jnp.zeros((), done.dtype)
    total = _Blocks({}, zero, zero, zero, zero, zero)
    for block in group_sites(done.captured.sites, done.alignments):
        held = curvature.blocks[block.name]
        thin = None
        if all(m.kind in THIN_KINDS for m in block.members):
            thin = _thin_gradient(done, block, pulled)
        if thin is not None and not exact and isinstance(held, Kronecker):
            # Only factored damping keeps a gradient's rank: dividing by sums of eigenvalues fills
            # the matrix.
            part = _thin_block(*thin, curvature, held, inverses, rank)
        else:
            gradient = _dense_gradient(done, block, pulled) if thin is None else _product(*thin)
            part = _dense_block(
                gradient, curvature, block, inverses, damping, rank if thin is not None else None
            )
        edit = dict(total.edit)
        for path, change in part.edit.items():
            edit[path] = added(edit[path], change) if path in edit else change
        sums = (x + y.astype(x.dtype) for x, y in zip(total[1:], part[1:], strict=True))
        total = _Blocks(edit, *sums)
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


def _inner_product(one: tuple[Array, Array], other: tuple[Array, Array]) -> Array:
    """Return <aᵀg, bᵀh> of two pairs of thin matrices (layers, positions, features).

    As a sum over pairs of positions, in which neither product is formed; but where a pair holds
    more numbers than its product, of the products themselves, which are then the smaller and the
    quicker way.
    """
    (a, g), (b, h) = one, other
    rows, d_in, d_out = max(a.shape[1], b.shape[1]), a.shape[2], g.shape[2]
    if rows * (d_in + d_out) > d_in * d_out:
        return jnp.sum(_product(a, g) * _product(b, h))
    return jnp.sum(_inner(a, b) * _inner(g, h))


def _thin_block(
    a: Array,
    g: Array,
    curvature: Curvature,
    held: Kronecker,
    inverses: dict[str, Array],
    rank: int | None,
) -> _Blocks:
    A, G = (matrix_of(curvature.factors[f], held.weight.path) for f in (held.input, held.output))
    left, right = _times(a, inverses[held.input]), _times(g, inverses[held.output])
    norm2 = _inner_product((a, g), (a, g))
    zero = jnp.zeros((), a.dtype)
    # Read beside what is cut off alone.
    edit_norm2 = zero if rank is None else _inner_product((left, right), (left, right))
    thin, cut2 = jnp.swapaxes(left, 1, 2), zero
    if rank is not None and rank < a.shape[1]:
        cut = truncate(thin, right, rank)
        cut2 = jnp.sum(cut.lost2)
        thin, right = cut.left, cut.right
        # The gain and the KL reported are those of the edit after the cut.
        left = jnp.swapaxes(thin, 1, 2)
    gain = _inner_product((a, g), (left, right))
    quadratic = _inner_product((left, right), (_times(left, A), _times(right, G)))
    edit = _low_rank(held, thin, right)
    return _Blocks(edit, norm2, gain, quadratic, cut2, edit_norm2)


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
) -> _Blocks:
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
    norm2, cut2 = jnp.sum(step**2), jnp.zeros((), step.dtype)
    if rank is None or not isinstance(held, Kronecker):
        edit: dict[str, Array | LowRank] = dict(held.weight.scatter(step))
    else:
        cut = truncate(step, None, rank)
        cut2 = jnp.sum(cut.lost2)
        step = jnp.matmul(cut.left, cut.right, precision=HIGHEST)
        edit = _low_rank(held, cut.left, cut.right)
    gain = jnp.sum(gradient * step)
    quadratic = _quadratic(curvature, block.name, step)
    return _Blocks(edit, jnp.sum(gradient**2), gain, quadratic, cut2, norm2)


def _quadratic(curvature: Curvature, name: str, step: Array) -> Array:
    """Return Tᵀ F T of one block's matrix."""
    held = curvature.blocks[name]
    if is_undecomposed(held, curvature):
        pair = factored.damped_pair(curvature, held, 0.0, absolute=False)
        moved = factored.multiplied(pair, step, held.sharding)
        return jnp.maximum(jnp.sum(step * moved), 0)
    return jnp.sum(eigenvalues(curvature, name) * rotate(curvature, name, step) ** 2)
