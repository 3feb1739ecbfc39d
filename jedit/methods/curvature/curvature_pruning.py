"""Curvature pruning: keep of a weight what most rows need (Goodfire, arXiv 2510.24256).

    W <- W - α (W - P W)
    P W = U_A U_Aᵀ W U_G U_Gᵀ              `keep="factors"`
    P W = Q_A [ M ∘ (Q_Aᵀ W Q_G) ] Q_Gᵀ    `keep="product"`, M_ij = 1 where Λ_ij is large

    A, G     moments of inputs and output gradients, paper: the same     `curvature`
    Q_A, Q_G all their eigenvectors, a_i and g_j the eigenvalues
    U_A, U_G the fewest top ones that hold a share ρ of Σ a, and of Σ g   `mass`
    Λ        a_i g_j, or EK-FAC's corrected eigenvalues; as few of them
             as hold a share ρ of Σ Λ
    α        1, the whole edit; an edit's scale is another

A memorised row's curvature is sharp, but every such row's directions are others: in the mean over
many rows they are flat, and what is shared is not. So the general rows' curvature alone, which
names no forget row, says what may go [paper]. The bias is the last row of W.

Differences. Both ways of keeping, ρ for each factor or of the products, are the code's [code, in
versions]; there W stands transposed, U_G U_Gᵀ W U_A U_Aᵀ. Corrected eigenvalues are ours, and so is
that equal eigenvalues go together. The code edits the perceptrons' matrices of a few late blocks:
here whatever the curvature covers, which `kfac(select=...)` says. ρ = 0.8 is its example, of three
matrices of one block; other figures were tuned by block. No one ρ suits all networks: with all
matrices cut, 0.999 leaves a perceptron of the digits 33-44% of what it has by heart, and 0.8 leaves
it 13-26% of what it knows in general; 0.8 leaves a small GPT 82-86% by heart and 90-99% in general
(tests/bench/claims/spectral.md). So the catalogue's row does not set it (ours): it searches for the
least ρ whose true KL on the retain rows stays within a budget. A block of which no row needs
anything stays.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind, check_word, refuse_tracers
from jedit.core.checks import POSITIVE_SHARE, check_finite, check_numbers, culprit
from jedit.core.devices import on_auto_axes, sharding_of
from jedit.core.display import short_repr
from jedit.curvature import Curvature
from jedit.curvature.algebra import eigenvalues, gather, rotate
from jedit.curvature.checks import check_counted, check_covers
from jedit.curvature.types import Kronecker
from jedit.edits import Edit
from jedit.methods._two_sets import add_changes

Keep = Literal["product", "factors"]


class PruningInfo(NamedTuple):
    """Measurements of what was kept, by block; arrays (layers,).

    Attributes:
        kept: share of the coordinates of W in the eigenbasis that stay.
        mass: share of the sum of all eigenvalues that they hold.
        relative_norm: ‖W - P W‖ / ‖W‖, the bias included.
    """

    kept: dict[str, Array]
    mass: dict[str, Array]
    relative_norm: dict[str, Array]

    __repr__ = short_repr


@jax.jit
def least_kept(
    values: Float[Array, "layers *rest"], mass: float | Array
) -> Float[Array, "layers *ones"]:
    """Return the largest τ for which the values from τ on hold the share `mass` of their sum.

    Of a layer without any, 0, from which on all is kept. By halving the range of the numbers' bits,
    which rise as non-negative numbers do: exact, and without a sort of a matrix that lies on many
    devices.
    """
    bits = jnp.int64 if values.dtype == jnp.float64 else jnp.int32
    axes = tuple(range(1, values.ndim))
    enough = jnp.asarray(mass, values.dtype) * jnp.sum(values, axis=axes, keepdims=True)
    as_number = lambda b: jax.lax.bitcast_convert_type(b, values.dtype)  # noqa: E731

    def narrowed(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        is_enough = (
            jnp.sum(jnp.where(values >= as_number(middle), values, 0), axis=axes, keepdims=True)
            >= enough
        )
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle - 1)

    most = jnp.max(values, axis=axes, keepdims=True)
    high = jax.lax.bitcast_convert_type(most, bits)
    low, _ = jax.lax.fori_loop(0, jnp.iinfo(bits).bits, narrowed, (jnp.zeros_like(high), high))
    return as_number(low)


@on_auto_axes
def curvature_pruning(
    params: PyTree, curvature: Curvature, *, mass: float = 0.8, keep: Keep = "product"
) -> tuple[Edit, PruningInfo]:
    """Take out the part of the weights that the curvature's rows hardly need.

        estimator = jedit.kfac(apply, Categorical(), select="mlp")
        curvature = jedit.estimate(estimator, params, batches(general, 32), key=key)
        edit, info = curvature_pruning(params, curvature, mass=0.8)

    Args:
        params: the parameters W.
        curvature: of general rows, at `params`. Blocks without two factors are left alone; tables
            lose the rows of tokens that no row holds, so select what is to be pruned.
        mass: ρ, the share of the eigenvalues' sum that is kept; 0.8 is the code's example. With
            "factors" it is the share of each factor's, and of the products the square is kept. 1
            takes nothing out.
        keep: "product" (the code's better; ours where eigenvalues are corrected), or "factors".

    Returns:
        The edit, and what was kept. Costs two rotations a matrix, one matrix at a time.

    Raises:
        ValueError: a share out of its range, an unknown `keep`, no Kronecker block, or corrected
            eigenvalues with "factors", which looks at none.
        FloatingPointError: parameters, or the edit, are not finite.
    """
    check_numbers(POSITIVE_SHARE, mass=mass)
    check_word(Keep, keep=keep)
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    leaves = check_covers(curvature, params)
    refuse_tracers("curvature pruning", (params, curvature), "take it outside")
    blocks = {n: b for n, b in curvature.blocks.items() if isinstance(b, Kronecker)}
    if not blocks:
        raise ValueError("the curvature has no Kronecker block, so no factors with directions")
    check_counted(curvature.num_outputs)
    if keep == "factors" and any(block.corrected is not None for block in blocks.values()):
        raise ValueError(
            'keep="factors" would not look at the corrected eigenvalues; give `kfac`\'s curvature, '
            'or keep="product"'
        )
    changes: dict[str, Array] = {}
    info = PruningInfo({}, {}, {})
    for name, block in blocks.items():
        values = eigenvalues(curvature, name)
        cut = _cut_of(curvature, block, values, mass, keep)
        dtype = values.dtype
        weight = gather(block, {p: leaves[p].astype(dtype) for p in block.weight.paths})
        turned = rotate(curvature, name, weight)
        # Where nothing is cut the difference is zero to the bit, and not what rounding leaves.
        taken = rotate(curvature, name, jnp.where(cut, -turned, 0), back=True)
        parts = block.weight.scatter(taken)
        for path, part in parts.items():
            if (place := sharding_of(leaves[path])) is not None:
                parts[path] = jax.lax.with_sharding_constraint(part, place)
        add_changes(changes, parts)
        of = lambda x: jnp.sum(x, axis=(1, 2))  # noqa: E731
        total, size = of(values), jnp.sqrt(of(turned**2))
        info.kept[name] = 1 - jnp.mean(cut, axis=(1, 2), dtype=dtype)
        info.mass[name] = of(jnp.where(cut, 0, values)) / jnp.where(total > 0, total, 1)
        gone = jnp.sqrt(of(jnp.where(cut, turned, 0) ** 2))
        info.relative_norm[name] = gone / jnp.where(size > 0, size, 1)
    check_finite("the pruning", changes, lambda: culprit(params, {}))
    return Edit(changes), info


def _cut_of(
    curvature: Curvature, block: Kronecker, values: Array, mass: float, keep: Keep
) -> Array:
    """Say which coordinates of a block are cut off, (layers, rows, d_out)."""
    if mass == 1:
        return jnp.zeros(values.shape, bool)
    if keep == "product":
        return values < least_kept(values, mass)
    a, g = (curvature.factors[factor].eigenvalues for factor in (block.input, block.output))
    is_low = [x < least_kept(x, mass) for x in (a, g)]
    return is_low[0][:, :, None] | is_low[1][:, None, :]
