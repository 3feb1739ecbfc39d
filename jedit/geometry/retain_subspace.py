"""A streaming basis of retain gradients, and what of a gradient is off it (GU, arXiv 2511.17100).

    z    = W g               whitened gradient: W = h^(-1/2) for Adam, F^(-1/2) for a curvature
    Q    orthonormal rows that span the whitened retain gradients, rank r
    z_⊥  = z_f - QᵀQ z_f     `project_out`: the best among moves that leave, to first order, the
                             retain loss alone, when steps are measured in that metric
    a, b = Q z_f, Q z_r      tangent parts of forget and retain gradients
    z    = z_⊥ + s Qᵀ(a ∘ [ab > τ ‖z_f‖ ‖z_r‖]) + β QᵀQ z_r      `joint_direction`; s so that
                             the second term is no longer than κ ‖z_⊥‖
    g    = W⁻¹ z

Both gradients are of losses to be lowered, so a_i b_i > 0 says that direction i serves both.
[author's derivation]. Differences. The basis holds raw gradients and is whitened anew at each use,
because the metric of an optimizer moves. Beside the first-in first-out window there is a
frequent-directions sketch (Liberty 2013), whose rows are not gradients but keep the most of them.
With scope "leaf" every parameter has a basis of its own [derived]. τ is relative, and by default
above rounding: a retain gradient that is in the basis has no part along most of its rows, and at
τ = 0 the signs of what rounding leaves there decide which parts of the forget gradient stay.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_word
from jedit.core.checks import COUNT, NOT_NEGATIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.precision import cast_like, everywhere, exponents, shifted, total, wide_dtype
from jedit.curvature import Curvature, power
from jedit.curvature.checks import check_has_powers
from jedit.geometry.surrogate import Scope

Sketch = Literal["fifo", "frequent_directions"]
RELATIVE = 1e3  # times a dtype's rounding: what is smaller, next to what it came from, is nothing


class Whitening(NamedTuple):
    """A metric as its square root: two linear functions on trees, each the other's inverse.

    Attributes:
        whiten: the function g -> z = W g.
        unwhiten: the function z -> g = W⁻¹ z.
    """

    whiten: Callable[[PyTree], PyTree]
    unwhiten: Callable[[PyTree], PyTree]

    __repr__ = short_repr


EUCLIDEAN = Whitening(lambda tree: tree, lambda tree: tree)


def adam_whitening(second_moment: PyTree, eps: float = 1e-8) -> Whitening:
    """Return Adam's metric: z = g / sqrt(h), h = sqrt(v̂) + eps, v̂ bias-corrected."""
    check_numbers(NOT_NEGATIVE, eps=eps)
    roots = jax.tree.map(lambda v: jnp.sqrt(jnp.sqrt(v) + eps), second_moment)
    return Whitening(
        lambda tree: _leafwise(jnp.divide, tree, roots),
        lambda tree: _leafwise(jnp.multiply, tree, roots),
    )


@on_auto_axes
def _leafwise(function: Callable, one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(function, one, other)


def curvature_whitening(curvature: Curvature, *, damping: float | Array) -> Whitening:
    """Return a curvature's metric: z = (F + λ)^-1/2 g; what it does not cover stays as it is.

    λ is in units of each block's mean eigenvalue.

    Raises:
        ValueError: the curvature was kept without eigenvectors, or a damping that is none.
    """
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_has_powers(curvature)
    options = {"damping": damping, "uncovered": "identity"}
    return Whitening(
        lambda tree: power(curvature, tree, -0.5, **options),
        lambda tree: power(curvature, tree, 0.5, **options),
    )


class SubspaceState(NamedTuple):
    """Rows that span the retain gradients seen so far.

    Attributes:
        rows: a tree like params, each leaf with a leading axis of length `rank`, float32 or wider.
        count: how many gradients were seen, int32.
    """

    rows: PyTree
    count: Array

    __repr__ = short_repr


class RetainSubspace(NamedTuple):
    """A streaming basis of retain gradients, as three pure functions.

    Attributes:
        init: `init(params) -> SubspaceState`, empty.
        update: `update(state, grads) -> SubspaceState`.
        value: `value(state, whitening=EUCLIDEAN) -> basis`: orthonormal rows, a tree like
            `SubspaceState.rows`; zero rows where the gradients were fewer or dependent.
    """

    init: Callable
    update: Callable
    value: Callable

    __repr__ = short_repr


def retain_subspace(rank: int, *, scope: Scope = "leaf", sketch: Sketch = "fifo") -> RetainSubspace:
    """Return a basis of at most `rank` retain gradients, kept up to date as they come.

    Args:
        rank: r, the number of rows. The state takes r times the parameters' memory.
        scope: "leaf", a basis for every parameter, or "global", one for the whole tree.
        sketch: "fifo", the last r gradients, or "frequent_directions", whose covariance is within
            ‖all gradients‖² / r of the true one.

    Returns:
        The functions; they jit and vmap. An update copies the gradient ("fifo") or costs 4 r² flops
        a parameter, a value 8 r².

    Raises:
        ValueError: rank below one, unknown scope or sketch.
    """
    check_numbers(COUNT, rank=rank)
    check_word(Scope, scope=scope)
    check_word(Sketch, sketch=sketch)

    def init(params: PyTree) -> SubspaceState:
        rows = jax.tree.map(lambda p: jnp.zeros((rank, *p.shape), wide_dtype(p.dtype)), params)
        return SubspaceState(rows, jnp.zeros((), jnp.int32))

    @on_auto_axes
    def update(state: SubspaceState, grads: PyTree) -> SubspaceState:
        grads = jax.tree.map(lambda g, rows: g.astype(rows.dtype), grads, state.rows)
        if sketch == "fifo":
            here = state.count % rank
            rows = jax.tree.map(
                lambda rows, g: jax.lax.dynamic_update_index_in_dim(rows, g, here, 0),
                state.rows,
                grads,
            )
        else:
            rows = _shrink(state.rows, grads, scope)
        return SubspaceState(rows, state.count + 1)

    @on_auto_axes
    def value(state: SubspaceState, whitening: Whitening = EUCLIDEAN) -> PyTree:
        return _orthonormal(jax.vmap(whitening.whiten)(state.rows), scope)

    return RetainSubspace(init, update, value)


@on_auto_axes
def project_out(basis: PyTree, tree: PyTree, *, scope: Scope = "leaf") -> PyTree:
    """Return z - QᵀQ z.

    Args:
        basis: orthonormal rows, from `RetainSubspace.value`.
        tree: z, whitened as the basis was.
        scope: the scope that the basis was made with, "leaf" or "global".

    Returns:
        A tree like `tree`, in its dtypes.

    Raises:
        ValueError: the scope is another word.
    """
    check_word(Scope, scope=scope)
    return cast_like(_off(basis, tree, scope), tree)


@on_auto_axes
def joint_direction(
    basis: PyTree,
    forget: PyTree,
    retain: PyTree,
    *,
    threshold: float | None = None,
    ratio: float = 1.0,
    pull: float = 0.0,
    scope: Scope = "leaf",
) -> PyTree:
    """Return what is off the subspace, and of what is in it the parts that agree, by GU's rule.

    The parts are those along the basis's own rows. Gram-Schmidt makes them one after the other, so
    that the same gradients in another order span the same subspace and have other parts.

    Args:
        basis: orthonormal rows, from `RetainSubspace.value`.
        forget: z_f, whitened, of a loss to be lowered.
        retain: z_r, whitened, of a loss to be lowered.
        threshold: τ, in units of ‖z_f‖ ‖z_r‖; None: 1000 times the dtype's rounding, 1e-4 in
            float32, as in the rule by which a row of the basis counts as dependent. Zero leaves it
            to rounding which directions agree.
        ratio: κ, the greatest length of the agreeing part over that of z_⊥.
        pull: β, the weight of the retain gradient's part in the subspace.
        scope: the scope that the basis was made with, "leaf" or "global".

    Returns:
        The direction z, in `forget`'s dtypes.

    Raises:
        ValueError: the scope is another word, or a number is out of its range.
    """
    check_numbers(NOT_NEGATIVE, threshold=threshold, ratio=ratio, pull=pull)
    check_word(Scope, scope=scope)
    forget_wide, retain_wide = (
        jax.tree.map(lambda z, q: z.astype(q.dtype), tree, basis) for tree in (forget, retain)
    )
    a, b = _coefficients(basis, forget, scope), _coefficients(basis, retain, scope)
    off = _off(basis, forget, scope)

    def agree(a, b, n_f, n_r):
        level = RELATIVE * jnp.finfo(a.dtype).eps if threshold is None else threshold
        share = a / jnp.where(n_f > 0, n_f, 1) * (b / jnp.where(n_r > 0, n_r, 1))
        return jnp.where(share > level, a, 0)

    agreeing = jax.tree.map(agree, a, b, _norms(forget_wide, scope), _norms(retain_wide, scope))
    inside = _combine(basis, agreeing)
    norm_off, norm_in = _norms(off, scope), _norms(inside, scope)

    def joint(z, t, pulled, n_off, n_in):
        scale = jnp.minimum(1, ratio * n_off / jnp.where(n_in > 0, n_in, 1))
        return z + scale * t + pull * pulled

    found = jax.tree.map(joint, off, inside, _combine(basis, b), norm_off, norm_in)
    return cast_like(found, forget)


def _coefficients(basis: PyTree, tree: PyTree, scope: Scope) -> PyTree:
    """Return Q z, (rank,) at every leaf: of the leaf, or of the whole tree."""
    own = jax.tree.map(
        lambda q, z: jnp.einsum(
            "rn,n->r",
            q.reshape(q.shape[0], -1),
            z.astype(q.dtype).reshape(-1),
            precision=jax.lax.Precision.HIGHEST,
        ),
        basis,
        tree,
    )
    return own if scope == "leaf" else everywhere(own)


def _combine(basis: PyTree, coefficients: PyTree) -> PyTree:
    """Return the combination Qᵀ c of the basis's rows."""
    return jax.tree.map(
        lambda q, c: jnp.tensordot(c, q, axes=1, precision=jax.lax.Precision.HIGHEST),
        basis,
        coefficients,
    )


def _off(basis: PyTree, tree: PyTree, scope: Scope) -> PyTree:
    left = jax.tree.map(lambda z, q: z.astype(q.dtype), tree, basis)
    for _ in range(2):  # the second time takes off what cancellation has left
        inside = _combine(basis, _coefficients(basis, left, scope))
        left = jax.tree.map(jnp.subtract, left, inside)
    return left


def _norms(tree: PyTree, scope: Scope) -> PyTree:
    by = exponents(tree, by_leaf=scope == "leaf")
    unit = shifted(tree, jax.tree.map(jnp.negative, by))
    squares = jax.tree.map(lambda x: jnp.sum(x * x), unit)
    squares = squares if scope == "leaf" else everywhere(squares)
    return jax.tree.map(lambda square, n: jnp.ldexp(jnp.sqrt(square), n), squares, by)


def _orthonormal(rows: PyTree, scope: Scope) -> PyTree:
    """Orthonormalise by Gram-Schmidt, each row twice; one that depends on others becomes zero."""
    rank = jax.tree.leaves(rows)[0].shape[0]
    sizes = _norms(rows, scope)  # all rows together, the scale of what counts as nothing

    def one(k: Array, basis: PyTree) -> PyTree:
        row = jax.tree.map(lambda r: jax.lax.dynamic_index_in_dim(r, k, 0, keepdims=False), rows)
        norm = _norms(row, scope)
        left = _off(basis, row, scope)
        new = _norms(left, scope)

        def put(q, z, old, now, size):
            eps = jnp.finfo(q.dtype).eps
            is_new = now > jnp.maximum(RELATIVE * eps * old, eps * size)
            unit = jnp.where(is_new, z / jnp.where(is_new, now, 1), 0)
            return jax.lax.dynamic_update_index_in_dim(q, unit, k, 0)

        return jax.tree.map(put, basis, left, norm, new, sizes)

    return jax.lax.fori_loop(0, rank, one, jax.tree.map(jnp.zeros_like, rows))


def _shrink(rows: PyTree, grads: PyTree, scope: Scope) -> PyTree:
    """Put r + 1 rows into r by frequent directions: the least squared singular value is lost."""
    stacked = jax.tree.map(lambda r, g: jnp.concatenate([r, g[None]]), rows, grads)
    # The maps do not depend on how long the rows are together, and their squares may not be held.
    by = exponents(stacked, by_leaf=scope == "leaf")
    unit = shifted(stacked, jax.tree.map(jnp.negative, by))
    grams = jax.tree.map(
        lambda x: jnp.einsum(
            "rn,sn->rs",
            x.reshape(x.shape[0], -1),
            x.reshape(x.shape[0], -1),
            precision=jax.lax.Precision.HIGHEST,
        ),
        unit,
    )
    if scope == "global":
        # One decomposition for all leaves.
        shared = _shrinking(total(grams))
        maps = jax.tree.map(lambda _: shared, grams)
    else:
        maps = jax.tree.map(_shrinking, grams)
    return jax.tree.map(
        lambda m, x: jnp.tensordot(m, x, axes=1, precision=jax.lax.Precision.HIGHEST),
        maps,
        stacked,
    )


def _shrinking(gram: Array) -> Array:
    """Return the map (r, r + 1) from rows UΣVᵀ to new ones: sqrt(1 - σ²_min/σ²) Uᵀ."""
    values, vectors = jnp.linalg.eigh(gram)
    values = jnp.maximum(values, 0)
    is_kept = values > len(gram) * jnp.finfo(gram.dtype).eps * values[-1]
    ratio = jnp.where(is_kept, (values - values[0]) / jnp.where(is_kept, values, 1), 0)
    # `eigh` is ascending: the first row is the one that became zero.
    return (jnp.sqrt(ratio)[:, None] * vectors.T)[1:]
