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
tokens of the answer [ours].  Where a part of the parameters is trained, the gradients are those of
that part, since a basis of the whole tree is none of a part of it [ours].  The geometry-aware form
needs no gradient: `project_to_null_space` of the inputs that earlier tasks use, with a learner's
`method` a function of the anchor's curvature.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_batch, check_key, check_params
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.geometry import retain_subspace
from jedit.geometry.retain_subspace import SubspaceState
from jedit.objectives import Objective
from jedit.training.freezing import merge, split, which_are_trained
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


@on_auto_axes
def stored_gradients(
    apply: Apply,
    params: PyTree,
    rows: Batch,
    *,
    rank: int,
    samples: int,
    key: Array,
    before: Stored | None = None,
    trainable: str | None = None,
) -> Stored:
    """Store gradients of a task that has been learnt, beside those of the tasks before.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the parameters now.
        rows: the rows of the task.
        rank: how many gradients there is room for, all tasks together; it takes so many copies of
            the parameters.
        samples: how many of the rows that count are drawn, without repetition; all, if there are
            fewer.
        key: the random key that draws them.
        before: what the tasks before have stored; None: nothing.
        trainable: the regular expression of the method that learns on, if it has one; None: all
            parameters. With another one than the method's, its steps are not orthogonal.

    Returns:
        The gradients and their basis. Costs a gradient a row, and 8 rank² flops a parameter.

    Raises:
        ValueError: a number below one, a `before` of another rank, an expression that matches no
            parameter, or no row that counts.
    """
    check_numbers(COUNT, rank=rank, samples=samples)
    check_params(params)
    check_key(key)
    check_batch(rows, "rows")
    is_trained = which_are_trained(params, trainable)
    outputs = jax.eval_shape(apply, params, rows.inputs)
    counted = np.asarray(counted_outputs(rows, outputs.shape[:-1]))
    # A row that counts nothing would take the place of one that does.
    counting = np.flatnonzero(counted.reshape(len(counted), -1).any(axis=1))
    if not len(counting):
        raise ValueError("rows count no output, so there is no gradient to store")
    chosen = counting[np.asarray(jax.random.permutation(key, len(counting)))[:samples]]
    subspace = retain_subspace(rank, scope="global")
    state = subspace.init(_as_real(params)) if before is None else before.gradients
    room = len(jax.tree.leaves(state.rows)[0])
    if room != rank:
        raise ValueError(f"rank must be that of before, {room}; got {rank}")
    drawn = jax.tree.map(lambda x: jnp.asarray(x)[chosen], rows)
    state = _added(apply, rank, is_trained, state, params, drawn)
    return Stored(state, _basis(rank, state))


def _as_real(params: PyTree) -> PyTree:
    """Return params with leaves that are not real in the dtype of those that are."""
    dtypes = [x.dtype for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    dtype = jnp.result_type(*dtypes)
    return jax.tree.map(lambda x: x if x.dtype in dtypes else x.astype(dtype), params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _added(
    apply: Apply,
    rank: int,
    is_trained: tuple[bool, ...],
    state: SubspaceState,
    params: PyTree,
    rows: Batch,
) -> SubspaceState:
    """Add each row's gradient of the logits of its targets, zero where nothing is trained."""
    update = retain_subspace(rank, scope="global").update
    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

    def one(state: SubspaceState, row: Batch) -> tuple[SubspaceState, None]:
        batch = jax.tree.map(lambda x: x[None], row)

        def said(trained: PyTree) -> Array:
            logits = wide(apply(merge(trained, params, is_trained), batch.inputs))
            counted = counted_outputs(batch, logits.shape[:-1])
            targets = jnp.where(counted, batch.targets, 0)
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jnp.sum(jnp.where(counted, picked, 0))

        gradient = jax.grad(said)(split(params, is_trained))
        return update(state, merge(gradient, zero, is_trained)), None

    return jax.lax.scan(one, state, rows)[0]


@functools.partial(jax.jit, static_argnums=0)
def _basis(rank: int, state: SubspaceState) -> PyTree:
    return retain_subspace(rank, scope="global").value(state)


def ogd(objective: Objective, optimizer: optax.GradientTransformation) -> TrainingMethod:
    """Make orthogonal gradient descent of any objective and any optimizer.

        Learner(ogd(LearnNLL(), optax.sgd(0.1)), keep)     # keep's reference: stored_gradients(...)

    Of a part of the parameters: `ogd(...)._replace(trainable=...)`, the same expression being given
    to `stored_gradients`.

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
