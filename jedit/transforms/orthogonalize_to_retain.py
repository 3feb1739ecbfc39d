"""Take out of an update what moves the retain loss: u off the span of retain gradients (GU)."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_word
from jedit.core.checks import COUNT, NOT_NEGATIVE, SHARE, check_numbers
from jedit.core.precision import wide_dtype
from jedit.curvature import Curvature
from jedit.curvature.checks import check_has_powers
from jedit.geometry import (
    EUCLIDEAN,
    Whitening,
    adam_whitening,
    curvature_whitening,
    project_out,
    retain_subspace,
)
from jedit.geometry.retain_subspace import Sketch, SubspaceState
from jedit.geometry.surrogate import Scope
from jedit.transforms._arrays import owned

Metric = Literal["euclidean", "adam"]


class OrthogonalizeToRetainState(NamedTuple):
    """The retain gradients seen, and the metric.

    Attributes:
        subspace: the last `rank` retain gradients, raw.
        second_moment: running mean of squared updates, for metric "adam"; else zero-sized.
        count: the number of updates made, int32.
        curvature: the metric if it is one; else None.
    """

    subspace: SubspaceState
    second_moment: PyTree
    count: Array
    curvature: Curvature | None


def orthogonalize_to_retain(
    rank: int = 8,
    *,
    refresh: int = 1,
    scope: Scope = "leaf",
    metric: Metric | Whitening | Curvature = "euclidean",
    sketch: Sketch = "fifo",
    decay: float = 0.999,
    eps: float = 1e-8,
    damping: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """Project updates off the span of the last retain gradients.

    Last in a chain it takes the retain loss's first-order change out of the step really made:

        optax.chain(optax.adamw(1e-4), orthogonalize_to_retain())

    In Adam's metric it stands in Adam's place and scales as Adam without momentum does, because
    only who knows h can keep the constraint through it; that is GU:

        optax.chain(orthogonalize_to_retain(metric="adam"), optax.scale_by_learning_rate(1e-4))

    In a curvature's metric what comes out is a gradient still: the natural step from it, damped
    alike, is what leaves the retain loss alone.

        optax.chain(
            orthogonalize_to_retain(metric=curvature, damping=0.1),
            scale_by_curvature(curvature, damping=0.1, uncovered="identity"),
            optax.scale_by_learning_rate(0.1),
        )

    `update` takes one of two extra arguments: `retain_grads`, a tree like params, or
    `retain_grad_fn(params) -> such a tree`, which is called at every `refresh`-th step alone.

    Args:
        rank: gradients kept (paper: 8).
        refresh: steps between two new gradients; 1 is every step.
        scope: "leaf", a subspace for every parameter (paper), or "global".
        metric: "euclidean" (the default), "adam" (h from a running mean of squared updates; what
            comes out is z_⊥/√h, a step), or a curvature or `Whitening` (what comes out is W⁻¹z_⊥, a
            gradient). A curvature's copy stands in the state, where `refresh_curvature` replaces
            it.
        sketch: "fifo" (paper) or "frequent_directions".
        decay: the decay of the running mean, 0.999, Adam's b2.
        eps: 1e-8, Adam's.
        damping: λ of a curvature's metric, in units of each block's mean eigenvalue; 0.1 is
            arbitrary.

    Returns:
        The transform. Costs `rank` copies of the params, and 8 rank² flops a parameter; in a
        curvature's metric `rank` + 2 of its rotations too.

    Raises:
        ValueError: unknown options, or a curvature without eigenvectors; at `update`, no retain
            gradient, or no params for its function.
    """
    check_numbers(COUNT, rank=rank, refresh=refresh)
    check_numbers(SHARE, decay=decay)
    check_numbers(NOT_NEGATIVE, eps=eps, damping=damping)
    if isinstance(metric, Curvature):
        check_has_powers(metric)
    elif not isinstance(metric, Whitening):
        check_word(Metric, metric=metric)
    subspace = retain_subspace(rank, scope=scope, sketch=sketch)

    def init(params) -> Any:
        def zeros(p):
            return jnp.zeros(p.shape if metric == "adam" else (0,), wide_dtype(p.dtype))

        return OrthogonalizeToRetainState(
            subspace.init(params),
            jax.tree.map(zeros, params),
            jnp.zeros((), jnp.int32),
            owned(metric) if isinstance(metric, Curvature) else None,
        )

    def update(
        updates, state, params=None, *, retain_grads=None, retain_grad_fn=None, **extra_args
    ) -> Any:
        del extra_args
        if (retain_grads is None) == (retain_grad_fn is None):
            raise ValueError(
                "orthogonalize_to_retain needs one of the extra arguments retain_grads (a tree) "
                "and retain_grad_fn (params -> tree) at update"
            )
        if retain_grad_fn is not None and params is None:
            raise ValueError("retain_grad_fn needs params: optimizer.update(g, state, params, ...)")

        def add(seen):
            grads = retain_grads if retain_grad_fn is None else retain_grad_fn(params)
            return subspace.update(seen, grads)

        # In a `cond`, so that between refreshes no retain gradient is computed.
        seen = jax.lax.cond(state.count % refresh == 0, add, lambda seen: seen, state.subspace)
        count = state.count + 1
        second = state.second_moment
        whitening = metric if isinstance(metric, Whitening) else EUCLIDEAN
        if state.curvature is not None:
            whitening = curvature_whitening(state.curvature, damping=damping)
        if metric == "adam":
            second = jax.tree.map(
                lambda v, u: decay * v + (1 - decay) * jnp.square(u.astype(v.dtype)),
                state.second_moment,
                updates,
            )
            correction = jax.tree.map(
                lambda v: v / (1 - jnp.asarray(decay, v.dtype) ** count.astype(v.dtype)), second
            )
            whitening = adam_whitening(correction, eps)
        wide = jax.tree.map(lambda u: u.astype(wide_dtype(u.dtype)), updates)
        basis = subspace.value(seen, whitening)
        left = project_out(basis, whitening.whiten(wide), scope=scope)
        # Adam's metric gives a step, W z_⊥, in Adam's place; any other a gradient, W⁻¹ z_⊥.
        left = whitening.whiten(left) if metric == "adam" else whitening.unwhiten(left)
        left = jax.tree.map(lambda x, u: x.astype(u.dtype), left, updates)
        return left, OrthogonalizeToRetainState(seen, second, count, state.curvature)

    return optax.GradientTransformationExtraArgs(init, update)
