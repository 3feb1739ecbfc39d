"""OGD, orthogonal gradient descent (Farajtabar et al., AISTATS 2020, arXiv 1910.07104).

    g̃ = g - Σ_{v in S} (gᵀv) v,   θ <- θ - η g̃

    S   orthonormal basis of ∇f_y(x; θ*), gradients of the logit of the true class at rows x of
        earlier tasks, each taken where its task had been learnt      `stored_gradients`
    g   gradient of the new task's loss                               `objective`
    η   any optimizer                                                 `optimizer`

so that to first order no step moves those logits ("OGD-GTL", which the paper recommends).

Differences. The projection stands last, so that any optimizer may come before it; the paper's is
plain descent, where the order does not matter.  The basis has a fixed number of rows, and the
oldest are overwritten when it is full.  How many rows a task stores is to be chosen; the paper's is
200 [notes].  A row's logits are summed over its outputs that count, for a language model over the
tokens of the answer [ours].  The geometry-aware form needs no gradient: `project_to_null_space` of
the inputs that earlier tasks use, with a learner's `method` a function of the anchor's curvature.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_batch, check_key, check_params
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, check_numbers
from jedit.core.display import short_repr
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.geometry import retain_subspace
from jedit.geometry.retain_subspace import SubspaceState
from jedit.objectives import Objective
from jedit.training.method import TrainingMethod
from jedit.transforms import project_out_stored


class Stored(NamedTuple):
    """Gradients of earlier tasks.

    Attributes:
        gradients: the raw gradients, and how many there were.
        basis: orthonormal rows that span them, which OGD takes out of its updates.
    """

    gradients: SubspaceState
    basis: PyTree

    __repr__ = short_repr


def stored_gradients(
    apply: Apply,
    params: PyTree,
    rows: Batch,
    *,
    rank: int,
    samples: int,
    key: Array,
    before: Stored | None = None,
) -> Stored:
    """Store gradients of a task that has been learnt, beside those of the tasks before.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the parameters now.
        rows: the rows of the task.
        rank: how many gradients there is room for, all tasks together; it takes so many copies of
            the parameters.
        samples: how many rows are drawn, without repetition; all, if there are fewer.
        key: the random key that draws them.
        before: what the tasks before have stored; None: nothing.

    Returns:
        The gradients and their basis. Costs a gradient a row, and 8 rank² flops a parameter.

    Raises:
        ValueError: a number below one, or a `before` of another rank.
    """
    check_numbers(COUNT, rank=rank, samples=samples)
    check_params(params)
    check_key(key)
    check_batch(rows, "rows")
    count = len(jax.tree.leaves(rows.inputs)[0])
    chosen = jax.random.permutation(key, count)[: min(samples, count)]
    subspace = retain_subspace(rank, scope="global")
    state = subspace.init(params) if before is None else before.gradients
    room = len(jax.tree.leaves(state.rows)[0])
    if room != rank:
        raise ValueError(f"rank must be that of before, {room}; got {rank}")
    drawn = jax.tree.map(lambda x: jnp.asarray(x)[chosen], rows)
    state = _added(apply, rank, state, params, drawn)
    return Stored(state, _basis(rank, state))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _added(
    apply: Apply, rank: int, state: SubspaceState, params: PyTree, rows: Batch
) -> SubspaceState:
    """Add each row's gradient of the logits of its targets."""
    update = retain_subspace(rank, scope="global").update

    def one(state: SubspaceState, row: Batch) -> tuple[SubspaceState, None]:
        batch = jax.tree.map(lambda x: x[None], row)

        def said(params: PyTree) -> Array:
            logits = wide(apply(params, batch.inputs))
            counted = counted_outputs(batch, logits.shape[:-1])
            targets = jnp.where(counted, batch.targets, 0)
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jnp.sum(jnp.where(counted, picked, 0))

        return update(state, jax.grad(said)(params)), None

    return jax.lax.scan(one, state, rows)[0]


@functools.partial(jax.jit, static_argnums=0)
def _basis(rank: int, state: SubspaceState) -> PyTree:
    return retain_subspace(rank, scope="global").value(state)


def ogd(objective: Objective, optimizer: optax.GradientTransformation) -> TrainingMethod:
    """Make orthogonal gradient descent of any objective and any optimizer.

        Learner(ogd(LearnNLL(), optax.sgd(0.1)), keep)     # keep's reference: stored_gradients(...)

    Args:
        objective: the objective that is lowered; it does not see the stored gradients.
        optimizer: the optimizer, whose steps are projected.

    Returns:
        A method whose reference is what `stored_gradients` returns.
    """
    chain = optax.chain(optimizer, project_out_stored())
    return TrainingMethod(objective, chain, _Stored())


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The projection's argument: the basis, out of the reference."""

    def __call__(
        self, apply: Callable, params: PyTree, forget: PyTree, retain: PyTree, reference: PyTree
    ) -> dict[str, PyTree]:
        del apply, params, forget, retain
        if not isinstance(reference, Stored):
            raise TypeError(
                "ogd needs as its reference what `stored_gradients` returns; got "
                f"{type(reference).__name__}"
            )
        return {"stored": reference.basis}
