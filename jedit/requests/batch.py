"""Many requests in one compiled call: a stack of edits, each the answer to one of them.

    d_r = (F + λ)⁻¹ g_r        g_r the gradient of request r's loss, to be raised
    Δ_r = α_r d_r              α_r such that ½ Δ_rᵀ F Δ_r is `predicted_kl`, or one

A request of n positions has g_r = Σ_n a_n g_nᵀ at a site: rank n. Factored damping,

    (A + λ_A)⁻¹ ⊗ (G + λ_G)⁻¹,   λ_A λ_G = λ,   λ_A / λ_G = mean(a) / mean(g)

(Martens & Grosse 2015) keeps that rank, so an edit is two thin matrices, and nothing larger than
these is formed for a request. Exact damping, 1 / (a_i g_j + λ), does not keep it: there
the edits of a chunk of requests are formed whole, all blocks of them, before they are cut down to
`rank`: `chunk` is what keeps that within memory.
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
from jedit.core.precision import exponents, shifted, wide
from jedit.curvature import Curvature, to_device
from jedit.curvature.captured_batch import Examples, Labels, run_pass
from jedit.curvature.checks import (
    check_counted,
    check_covers,
    check_decomposed,
    check_has_matrices,
)
from jedit.curvature.inverted import check_invertible
from jedit.curvature.likelihoods import Categorical, Likelihood, check_likelihood
from jedit.curvature.mesh.placement import off_axes
from jedit.edits import Edit
from jedit.methods._entrance import check_requests, refuse_zero_gradients
from jedit.requests.solution import all_blocks, damped_inverses


class BatchInfo(NamedTuple):
    """Measurements of a stack of R edits, one for each request, arrays of shape (R,).

    Attributes:
        loss: the request's loss before the edit, nats per counted output.
        gradient_norm: ‖g‖ over the covered parameters.
        step_size: the step size α of the request's edit; zero, which is no edit, where the step
            costs nothing by the curvature: none of its inputs is like any of the retain set.
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
    of the solver's `chunk` requests, by exact damping also their whole edits. Every call damps and
    inverts the factors anew, some 2 d³ flops for each of size d, which is as much as a request or
    two: give it many at a time.

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
    level = jnp.asarray(damping, float)
    inverses = {} if solver.exact else damped_inverses(curvature, level)
    over = row_sharding(requests)
    if over is not None:
        curvature = off_axes(curvature, over.axes)
    edits, info = _batch_unlearn(
        apply,
        params,
        requests,
        curvature,
        inverses,
        None if predicted_kl is None else jnp.asarray(predicted_kl, float),
        level,
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


@functools.partial(
    jax.jit,
    static_argnames=("apply", "likelihood", "solver", "over"),
)
def _batch_unlearn(
    apply,
    params,
    requests,
    curvature,
    inverses,
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
        blocks = all_blocks(done, pulled, curvature, inverses, damping, solver.exact, solver.rank)
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
