"""The sum over examples of squared per-example gradients, in any pair of bases.

    Σ_n [ Q_Aᵀ (Σ_s a_ns g_nsᵀ) Q_G ]²      (layers, rows, d_out)

which is EK-FAC's corrected spectrum, and with Q = 1 the diagonal of the Fisher. Inputs and
gradients are rotated first; a batch of one position an example is then one product of squares,
anything longer goes example by example, or a few small ones at a time, so that gradients of all
examples never coexist.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit.core.devices import fetched
from jedit.core.precision import HIGHEST
from jedit.curvature.captured_batch import Pass
from jedit.curvature.kernels import squared_gradient_sum
from jedit.curvature.layout import BlockSites, Member
from jedit.tracing import Site
from jedit.tracing.pullback import scatter_rows


def add_squared_gradients(
    done: Pass,
    block: BlockSites,
    pulled: dict[str, Array],
    total: Array | None,
    bases: tuple[Array | None, Array | None] = (None, None),
) -> Array:
    """Add one batch's squared gradients of one block to `total` (None: zero).

    Args:
        done: the captured batch, ready to be summed.
        block: the block's parameters and sites.
        pulled: the gradients of one pullback at the sites' outputs.
        total: the sum so far, (layers, rows, d_out).
        bases: eigenvectors of A (bias included) and of G; None for the standard basis.

    Returns:
        The new total.
    """
    weight = block.weight
    if total is None:
        total = jnp.zeros((weight.layers, weight.rows, weight.d_out), done.dtype)
    sites = done.captured.sites
    parts = [example_factors(done, sites[m.site], m, pulled, bases) for m in block.members]
    total = total + sum(done.poison(sites[m.site]) for m in block.members)
    if done.one_group([sites[m.site] for m in block.members]):
        parts = jax.tree.map(lambda x: x.reshape(len(x), 1, -1, *x.shape[3:]), parts)
    a, g = parts[0]
    if len(parts) == 1 and g is not None and a.ndim == 4 and not block.members[0].is_flipped:
        return squared_gradient_sum(total, a, g)

    def example(total, n_parts):
        gradient = sum(
            example_gradient(part, sites[m.site], m, bases)
            for part, m in zip(n_parts, block.members, strict=True)
        )
        return total + gradient**2, None

    by_example = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), parts)
    return jax.lax.scan(example, total, by_example)[0]


def example_factors(
    done: Pass, site: Site, member: Member, pulled, bases
) -> tuple[Array, Array | None]:
    """Return (a, g) of one site, rotated, (layers, examples, positions, features)."""
    g = done.gradients(site, pulled).astype(done.dtype)
    basis_in, basis_out = bases[::-1] if member.is_flipped else bases
    g = _rotate(g, basis_out)
    if site.kind == "bias":
        return jnp.full((*g.shape[:3], 1), member.scale, g.dtype), g
    a, v = done.inputs(site)
    if site.kind == "embedding":
        g = g if v is None else jnp.where(v[..., None], g, 0)
        return a, g
    a = a.astype(done.dtype)
    if site.kind == "scale":
        return (member.scale * a * g), None
    a = member.scale * a
    if site.weight.bias_path is None:
        return _rotate(a, basis_in), g
    ones = jnp.full((*a.shape[:3], 1), member.bias_scale, a.dtype)
    ones = ones if v is None else jnp.where(v[..., None], ones, 0)
    if basis_in is None:
        return jnp.concatenate([a, ones], axis=-1), g
    # The homogeneous coordinate is added after the product: appending it would copy all inputs.
    basis_in = fetched(basis_in)
    return _rotate(a, basis_in[:, :-1]) + ones * basis_in[:, -1][:, None, None], g


def _rotate(x: Array, basis: Array | None) -> Array:
    if basis is None:
        return x
    return jnp.einsum("lnsi,lij->lnsj", x, fetched(basis), precision=HIGHEST)


def example_gradient(part, site: Site, member: Member, bases) -> Array:
    """Return one example's gradient (layers, rows, d_out) in the block's bases and orientation."""
    a, g = part
    if site.kind == "embedding":
        basis_in = bases[1] if member.is_flipped else bases[0]
        gradient = jax.vmap(lambda i, x: scatter_rows(site, i, x))(a, g) * member.scale
        if basis_in is not None:  # a tied table whose row factor is dense
            gradient = jnp.einsum("lij,lio->ljo", fetched(basis_in), gradient, precision=HIGHEST)
    elif site.kind == "scale":
        gradient = jnp.sum(a, axis=1, keepdims=True)
    else:
        gradient = jnp.einsum("lsi,lso->lio", a, g, precision=HIGHEST)
    return jnp.swapaxes(gradient, 1, 2) if member.is_flipped else gradient
