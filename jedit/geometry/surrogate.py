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
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_word
from jedit.core.checks import POSITIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.precision import cast_like, everywhere, exponents, shifted, total, wide_dtype

Scope = Literal["global", "leaf"]


class RetainOrthogonalInfo(NamedTuple):
    """The angle of forget and retain gradients and what a direction gains, as scalars.

    Attributes:
        cos: cosine of the whole gradients, in the metric; 0 if one of them vanishes.
        sin: ‖q‖ / ‖g_f‖: the sine of the angle for scope "global", of a mean angle for "leaf".
        forget_gain: g_fᵀ times the direction or perturbation returned, the first-order gain.
        retain_change: g_rᵀ times the direction or perturbation, zero but for rounding.
        is_parallel: nothing but rounding is left of g_f off g_r, and the direction is zero.

    Gradients may be of any length; the two products of theirs are infinite, or zero, where they
    leave the dtype.
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
    scope: Scope = "global",
    metric: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, RetainOrthogonalInfo]:
    """Return the direction M⁻¹g_f with its component along the retain gradient taken off.

    Args:
        forget_grads: g_f, a pytree.
        retain_grads: g_r, a pytree of the same structure.
        scope: "global", one constraint, or "leaf", one for every leaf.
        metric: M⁻¹ as a function on trees, linear and symmetric, for instance
            `partial(jedit.solve, curvature, damping=0.1)`; None: the identity.

    Returns:
        q in the leaves' own dtypes, and the info. Parallel gradients give zero and a flag. A
        vanishing g_r constrains nothing.

    Raises:
        ValueError: an unknown scope, or trees of different structure.
    """
    direction, found, info = _direction(forget_grads, retain_grads, scope, metric)
    direction = jax.tree.map(lambda q: jnp.ldexp(q, found.length), direction)
    return cast_like(direction, forget_grads), info


@on_auto_axes
def retain_neutral_perturbation(
    forget_grads: PyTree,
    retain_grads: PyTree,
    *,
    radius: float | Array,
    scope: Scope = "global",
    metric: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, RetainOrthogonalInfo]:
    """Return the perturbation of norm ρ that raises the forget loss most, by ROSU's problem.

    Args:
        forget_grads: g_f, a pytree.
        retain_grads: g_r, a pytree of the same structure.
        radius: ρ, in the metric's norm.
        scope: "global", one constraint, or "leaf", one for every leaf.
        metric: M⁻¹ as a function on trees; None: the identity.

    Returns:
        δ, zero if the gradients are parallel, and the info.

    Raises:
        ValueError: the scope is unknown, the trees differ in structure, or the radius is not
            positive and finite.
    """
    check_numbers(POSITIVE, radius=radius)
    direction, found, info = _direction(forget_grads, retain_grads, scope, metric)
    norm = found.norm
    scale = jnp.where(info.is_parallel, 0, radius / jnp.where(norm > 0, norm, 1))
    delta = jax.tree.map(
        lambda q: jnp.ldexp(q * scale.astype(q.dtype), found.metric // 2), direction
    )
    change = found.retain_change * scale
    info = info._replace(
        forget_gain=jnp.ldexp(norm * norm * scale, found.forget + found.metric // 2),
        retain_change=jnp.ldexp(change, found.retain + found.metric // 2),
    )
    return cast_like(delta, forget_grads), info


class _Scaled(NamedTuple):
    """Results on gradients that powers of two had brought to entries of about one.

    Attributes:
        norm: ‖q'‖ in the metric, of the direction q' = 2^-length q.
        retain_change: r'ᵀq', r' = 2^-retain g_r.
        forget: the n by which g_f was scaled, 2^-n g_f.
        retain: the n by which g_r was scaled.
        metric: the n by which the metric's image of 2^-forget g_f was scaled; even.
    """

    norm: Array
    retain_change: Array
    forget: Array
    retain: Array
    metric: Array

    @property
    def length(self) -> Array:
        """Return the n of q' = 2^-n q."""
        return self.forget + self.metric


def _direction(forget, retain, scope, metric):
    """Return q' in float32 or wider, how it was scaled, and the info of q.

    Raises:
        ValueError: an unknown scope, or trees of different structure.
    """
    check_word(Scope, scope=scope)
    if jax.tree.structure(forget) != jax.tree.structure(retain):
        raise ValueError(
            "forget_grads and retain_grads differ in structure: "
            f"{jax.tree.structure(forget)} and {jax.tree.structure(retain)}"
        )
    metric = metric or (lambda tree: tree)
    # Powers of two are exact: products of short or long gradients stay within the dtype, and the
    # exponents are put back in the end, by `ldexp`.
    (forget, n_f), (retain, n_r) = (_unit(_widened(tree)) for tree in (forget, retain))
    (up_f, m_f), (up_r, m_r) = (_unit(metric(tree)) for tree in (forget, retain))
    norm_f, norm_r = (
        total(jax.tree.map(jnp.vdot, *pair)) for pair in ((forget, up_f), (retain, up_r))
    )
    size_f, size_r = (jnp.sqrt(jnp.maximum(norm, 0)) for norm in (norm_f, norm_r))
    size = size_f * size_r
    cos = total(jax.tree.map(jnp.vdot, forget, up_r)) / jnp.where(size > 0, size, 1)
    # m_f and m_r are even: the root of a power of two is one again.
    cos = jnp.clip(jnp.ldexp(cos, (m_r - m_f) // 2), -1, 1)
    # A constraint does not depend on the length of its gradient, which may be another in each leaf.
    by_leaf = scope == "leaf"
    n, m = (exponents(tree, by_leaf=by_leaf) for tree in (retain, up_r))
    along, up = (
        shifted(tree, jax.tree.map(jnp.negative, by)) for tree, by in ((retain, n), (up_r, m))
    )
    back = jax.tree.map(lambda n, m: m - n + m_r - m_f, n, m)
    norms = _products(along, up, by_leaf)

    def off(gradient, direction, products):
        """Return gradient and direction less their parts along g_r, c times g_r and M⁻¹g_r."""
        c = jax.tree.map(
            lambda p, n: jnp.where(n > 0, p / jnp.where(n > 0, n, 1), 0), products, norms
        )
        return (
            jax.tree.map(lambda x, c, r: x - c * r, gradient, c, along),
            jax.tree.map(lambda x, c, r, n: x - jnp.ldexp(c, n) * r, direction, c, up, back),
        )

    # The gradient that is left, and its direction; once more, for what cancellation has left.
    gradient, direction = off(forget, up_f, _products(forget, up, by_leaf))
    left = jax.tree.map(lambda p, n: jnp.ldexp(p, -n), _products(along, direction, by_leaf), back)
    gradient, direction = off(gradient, direction, left)
    # g_fᵀq is ‖q‖², q being M-orthogonal to M⁻¹g_r; out of two small factors, it keeps its digits.
    norm = jnp.sqrt(jnp.maximum(total(jax.tree.map(jnp.vdot, gradient, direction)), 0))
    # What is left within 100 roundings has no direction of its own.
    is_parallel = norm <= 100 * jnp.finfo(norm.dtype).eps * size_f
    direction = jax.tree.map(lambda q: jnp.where(is_parallel, 0, q), direction)
    change = total(jax.tree.map(jnp.vdot, retain, direction))
    found = _Scaled(norm, change, n_f, n_r, m_f)
    info = RetainOrthogonalInfo(
        cos,
        jnp.where(is_parallel, 0, jnp.minimum(norm / jnp.where(size_f > 0, size_f, 1), 1)),
        jnp.where(is_parallel, 0, jnp.ldexp(norm * norm, 2 * n_f + m_f)),
        jnp.ldexp(change, n_r + found.length),
        is_parallel,
    )
    return direction, found, info


def _unit(tree: PyTree) -> tuple[PyTree, Array]:
    """Return the tree divided by a power of two to entries of about one at most, and its n."""
    by = exponents(tree)
    return shifted(tree, jax.tree.map(jnp.negative, by)), jax.tree.leaves(by)[0]


def _products(x: PyTree, y: PyTree, by_leaf: bool) -> PyTree:
    products = jax.tree.map(jnp.vdot, x, y)
    return products if by_leaf else everywhere(products)


def _widened(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), tree)
