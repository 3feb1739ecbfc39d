"""Squared per-example gradients in bases of which the leading eigenvectors alone are known.

Along such an axis all directions without eigenvector have one value, in front: the mean square of
what is off the leading ones. With a = a₁ + Q_A α and g = g₁ + Q_G γ of one example's S positions,
K = a₁ a₁ᵀ and H = g₁ g₁ᵀ (S, S), the gradient's squares are

    Σ_st K_st H_st / (p q)    Σ_st γ_sj K_st γ_tj / p        p = d_in - k_A
    Σ_st α_si H_st α_ti / q   (Σ_s α_si γ_sj)²               q = d_out - k_G

so that no gradient of d_in d_out numbers is made where a block has one site of dense inputs, unless
S² is larger. What is off the leading ones is taken before it is squared: a difference of squares
would cancel.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jedit.core.devices import fetched
from jedit.core.precision import HIGHEST
from jedit.curvature.captured_batch import Pass
from jedit.curvature.eigenbases import rotate_axis
from jedit.curvature.kernels import squared_gradient_sum
from jedit.curvature.layout import BlockSites
from jedit.curvature.low_rank import has_rest
from jedit.curvature.squared_gradients import example_factors, example_gradient


def add_leading_squares(
    done: Pass,
    block: BlockSites,
    pulled: dict[str, Array],
    total: Float[Array, "layers _ _"],
    bases: tuple[Array | None, Array | None],
) -> Array:
    """Add one batch's squared gradients of one block, of which some basis has leading ones alone.

    Args:
        done: the captured batch, ready to be summed.
        block: the block's parameters and sites.
        pulled: the gradients of one pullback at the sites' outputs.
        total: the sum so far, 1 + k long along an axis with k eigenvectors.
        bases: eigenvectors of A (bias included) and of G; None for the standard basis.

    Returns:
        The new total.
    """
    sites = done.captured.sites
    # Along the axes of leading eigenvectors everything is taken as it is, and parted here.
    whole = tuple(None if has_rest(basis) else basis for basis in bases)
    parts = [example_factors(done, sites[m.site], m, pulled, whole) for m in block.members]
    total = total + sum(done.poison(sites[m.site]) for m in block.members)
    if done.one_group([sites[m.site] for m in block.members]):
        parts = jax.tree.map(lambda x: x.reshape(len(x), 1, -1, *x.shape[3:]), parts)
    a, g = parts[0]
    if (
        len(parts) == 1
        and g is not None
        and not block.members[0].is_flipped
        and a.ndim == 4
        # Gram matrices of more positions than that are larger than the gradient.
        and a.shape[2] ** 2 <= a.shape[3] * g.shape[3]
    ):
        return total + _by_positions(a, g, bases)

    def example(total, n_parts):
        each = [
            example_gradient(part, sites[m.site], m, whole)
            for part, m in zip(n_parts, block.members, strict=True)
        ]
        return total + _squares(functools.reduce(jnp.add, each), bases), None

    by_example = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), parts)
    return jax.lax.scan(example, total, by_example)[0]


def _squares(gradient: Float[Array, "layers rows d_out"], bases) -> Float[Array, "layers _ _"]:
    """Return one gradient's squares, those off the leading eigenvectors as their mean in front."""
    rows = [
        jnp.concatenate(_mean_squares(bases[1], part, 2), axis=2)
        for part in _parted(bases[0], gradient, 1)
    ]
    return jnp.concatenate(_fewer(bases[0], rows, 1), axis=1)


def _mean_squares(basis: Array | None, x: Array, axis: int) -> list[Array]:
    return _fewer(basis, [part**2 for part in _parted(basis, x, axis)], axis)


def _fewer(basis: Array | None, squares: list[Array], axis: int) -> list[Array]:
    """Return parts' squares with those off the leading eigenvectors as one, their mean."""
    if not has_rest(basis):
        return squares
    rest, lead = squares
    number = basis.shape[1] - basis.shape[2]
    return [jnp.sum(rest, axis=axis, keepdims=True) / number, lead]


def _parted(basis: Array | None, x: Array, axis: int) -> list[Array]:
    """Return what is off the leading eigenvectors, and what is on them; else x alone."""
    if not has_rest(basis):
        return [x]
    lead = rotate_axis(basis, x, axis)
    return [x - rotate_axis(basis, lead, axis, back=True), lead]


def _by_positions(
    a: Float[Array, "layers n s d_in"], g: Float[Array, "layers n s d_out"], bases
) -> Float[Array, "layers _ _"]:
    """Return the sum over examples of their gradients' squares."""
    (a_gram, a), (g_gram, g) = (_seen(x, q) for x, q in zip((a, g), bases, strict=True))
    zero = jnp.zeros((a.shape[0], a.shape[-1], g.shape[-1]), a.dtype)
    rows = squared_gradient_sum(zero, a, g)
    if a_gram is not None:
        rows = jnp.concatenate([_form(a_gram, g)[:, None], rows], axis=1)
    if g_gram is not None:
        first = _form(g_gram, a)
        if a_gram is not None:
            corner = jnp.sum(a_gram * g_gram, axis=(1, 2, 3))
            first = jnp.concatenate([corner[:, None], first], axis=1)
        rows = jnp.concatenate([first[:, :, None], rows], axis=2)
    return rows


def _seen(
    x: Float[Array, "layers n s d"], basis: Array | None
) -> tuple[Float[Array, "layers n s s"] | None, Float[Array, "layers n s k"]]:
    """Return the mean Gram matrix of what is off the leading eigenvectors, and what is on them.

    There is none where all directions are known.
    """
    if not has_rest(basis):
        return None, x
    basis = fetched(basis)
    lead = jnp.einsum("lnsd,ldk->lnsk", x, basis, precision=HIGHEST)
    rest = x - jnp.einsum("lnsk,ldk->lnsd", lead, basis, precision=HIGHEST)
    gram = jnp.einsum("lnsd,lntd->lnst", rest, rest, precision=HIGHEST)
    return gram / (basis.shape[1] - basis.shape[2]), lead


def _form(gram: Float[Array, "layers n s s"], x: Float[Array, "layers n s k"]) -> Array:
    """Return Σ over examples of x_sj K_st x_tj, (layers, k)."""
    return jnp.sum(x * jnp.matmul(gram, x, precision=HIGHEST), axis=(1, 2))
