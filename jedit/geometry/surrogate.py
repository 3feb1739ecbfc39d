"""Retain-orthogonal directions and perturbations (ROSU, arXiv 2605.05871).

    maximise g_fᵀ δ   subject to   g_rᵀ δ = 0,  ‖δ‖ <= ρ

    g_f   gradient of the loss that is to rise     `forget_grads`
    g_r   gradient of the loss that is to stay     `retain_grads`
    q     g_f - (⟨g_f, g_r⟩ / ‖g_r‖²) g_r          `retain_orthogonal`
    δ     ρ q / ‖q‖                                `retain_neutral_perturbation`

so that g_fᵀ δ = ρ ‖g_f‖ sin ∠(g_f, g_r) [derived: the only solution of the stated problem].

In a metric M, ‖δ‖² = δᵀMδ, the same holds of the directions M⁻¹g and the products
⟨x, y⟩ = xᵀM⁻¹y [derived]. With scope "leaf" every parameter has a constraint of its own,
g_rᵀδ = 0 leaf by leaf, and all share the one bound ρ [derived]: one gradient among millions of
dimensions constrains nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.geometry._trees import cast_like, everywhere, total
from jedit.sharding import on_auto_axes
from jedit.typing import wide_dtype

SCOPES = ("global", "leaf")


class RetainOrthogonalInfo(NamedTuple):
    """How forget and retain gradients stand to one another; scalars.

    Attributes:
        cos: cosine of the whole gradients, in the metric; 0 if one of them vanishes.
        sin: ‖q‖ / ‖g_f‖: of the angle for scope "global", of a mean angle for "leaf".
        forget_gain: g_fᵀ of the direction or perturbation returned: first order.
        retain_change: g_rᵀ of it; zero but for rounding.
        is_parallel: nothing but rounding is left of g_f off g_r, and the direction is zero.
    """

    cos: Float[Array, ""]
    sin: Float[Array, ""]
    forget_gain: Float[Array, ""]
    retain_change: Float[Array, ""]
    is_parallel: Array


@on_auto_axes
def retain_orthogonal(
    forget_grads: PyTree,
    retain_grads: PyTree,
    *,
    scope: str = "global",
    metric: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, RetainOrthogonalInfo]:
    """The direction M⁻¹g_f with its component along the retain gradient taken off.

    Args:
        forget_grads: g_f, a pytree.
        retain_grads: g_r, like it.
        scope: "global", one constraint, or "leaf", one for every leaf.
        metric: M⁻¹ as a function on trees, linear and symmetric, for instance
            `partial(jedit.solve, curvature, damping=0.1, relative=True)`; None: the identity.

    Returns:
        q in the leaves' own dtypes, and the info. Parallel gradients give zero and a flag. A
        vanishing g_r constrains nothing.

    Raises:
        ValueError: an unknown scope, or trees of different structure.
    """
    direction, norm, info = _direction(forget_grads, retain_grads, scope, metric)
    del norm
    return cast_like(direction, forget_grads), info


@on_auto_axes
def retain_neutral_perturbation(
    forget_grads: PyTree,
    retain_grads: PyTree,
    *,
    radius: float | Array,
    scope: str = "global",
    metric: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, RetainOrthogonalInfo]:
    """The perturbation of norm ρ that raises the forget loss most at no first-order retain change.

    Args:
        forget_grads: g_f.
        retain_grads: g_r.
        radius: ρ, in the metric's norm.
        scope: as for `retain_orthogonal`.
        metric: as for `retain_orthogonal`.

    Returns:
        δ, zero if the gradients are parallel, and the info.

    Raises:
        ValueError: as `retain_orthogonal`.
    """
    direction, norm, info = _direction(forget_grads, retain_grads, scope, metric)
    scale = jnp.where(info.is_parallel, 0, radius / jnp.where(norm > 0, norm, 1))
    delta = jax.tree.map(lambda q: q * scale.astype(q.dtype), direction)
    info = info._replace(
        forget_gain=info.forget_gain * scale, retain_change=info.retain_change * scale
    )
    return cast_like(delta, forget_grads), info


def _direction(forget, retain, scope, metric):
    """Return q in float32 or wider, ‖q‖ in the metric, and the info of q.

    Raises:
        ValueError: an unknown scope, or trees of different structure.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if jax.tree.structure(forget) != jax.tree.structure(retain):
        raise ValueError(
            "forget_grads and retain_grads differ in structure: "
            f"{jax.tree.structure(forget)} and {jax.tree.structure(retain)}"
        )
    metric = metric or (lambda tree: tree)
    forget, retain = _widened(forget), _widened(retain)
    up_f, up_r = metric(forget), metric(retain)
    products = jax.tree.map(jnp.vdot, forget, up_r)
    norms_r = jax.tree.map(jnp.vdot, retain, up_r)
    norm_f, norm_r = total(jax.tree.map(jnp.vdot, forget, up_f)), total(norms_r)
    if scope == "global":
        products, norms_r = everywhere(products), everywhere(norms_r)

    def off(tree, along, products):
        return jax.tree.map(
            lambda x, r, p, n: x - jnp.where(n > 0, p / jnp.where(n > 0, n, 1), 0) * r,
            tree,
            along,
            products,
            norms_r,
        )

    # The gradient that is left, and its direction; once more, for what cancellation has left.
    gradient, direction = off(forget, retain, products), off(up_f, up_r, products)
    left = jax.tree.map(jnp.vdot, retain, direction)
    left = everywhere(left) if scope == "global" else left
    gradient, direction = off(gradient, retain, left), off(direction, up_r, left)
    # g_fᵀq is ‖q‖², q being M-orthogonal to M⁻¹g_r; out of two small factors, it keeps its digits.
    gain = total(jax.tree.map(jnp.vdot, gradient, direction))
    norm = jnp.sqrt(jnp.maximum(gain, 0))
    size_f = jnp.sqrt(jnp.maximum(norm_f, 0))
    is_parallel = norm <= 100 * jnp.finfo(norm.dtype).eps * size_f
    scale = size_f * jnp.sqrt(jnp.maximum(norm_r, 0))
    cos = total(jax.tree.map(jnp.vdot, forget, up_r)) / jnp.where(scale > 0, scale, 1)
    direction = jax.tree.map(lambda q: jnp.where(is_parallel, 0, q), direction)
    info = RetainOrthogonalInfo(
        jnp.clip(cos, -1, 1),
        jnp.where(is_parallel, 0, jnp.minimum(norm / jnp.where(size_f > 0, size_f, 1), 1)),
        jnp.where(is_parallel, 0, gain),
        total(jax.tree.map(jnp.vdot, retain, direction)),
        is_parallel,
    )
    return direction, norm, info


def _widened(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), tree)
