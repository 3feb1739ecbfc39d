"""The Gauss-Newton matrix of the mean output KL, without forming it.

    G = (1/M) Σ_o J_oᵀ H_o J_o

over the M outputs o that the batch counts, J_o the Jacobian of output o in the parameters and H_o
the likelihood's Hessian there.  It is the second derivative at v = 0 of the mean of KL(θ || θ + v),
and what K-FAC with sampled or exact labels approximates, under the same normalisation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jedit.core.arguments import check_batch, check_function
from jedit.core.batch import Batch
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import counted_outputs
from jedit.core.precision import cast_like, wide
from jedit.core.row_blocks import num_blocks, sum_over_blocks
from jedit.curvature.likelihoods import Likelihood, check_likelihood


@on_auto_axes
def ggn_vector_product(
    apply: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Batch,
    vector: PyTree,
    *,
    likelihood: Likelihood,
) -> PyTree:
    """Return G v, shaped as `params`.

    Costs one forward pass with tangents and one backward pass, about two gradients; `apply` must
    therefore have a forward-mode rule, which a function under `jax.custom_vjp` lacks.  Outputs left
    out by `mask` or `valid` contribute an exact zero.  Large outputs are
    computed in blocks of rows.
    """
    check_likelihood(likelihood)
    number, total = _size(apply, params, batch, likelihood)

    def product(rows: Batch) -> PyTree:
        def run(params: PyTree) -> Array:
            return apply(params, rows.inputs)

        outputs, tangent = jax.jvp(run, (params,), (vector,))
        # G = Jᵀ H J: tangents forward, H at the outputs, and cotangents back; J is never formed.
        _, pull_back = jax.vjp(run, params)
        _, found = _masked_products(likelihood, rows, outputs, tangent, total)
        return pull_back(found.astype(outputs.dtype))[0]

    if number == 1:
        return product(batch)
    # Blocks are added in float32 or wider: in bfloat16 each sum would be rounded.
    added = sum_over_blocks(lambda rows: jax.tree.map(wide, product(rows)), batch, number)
    return cast_like(added, params)


@on_auto_axes
def quadratic_kl(
    apply: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Batch,
    vector: PyTree,
    *,
    likelihood: Likelihood,
) -> Float[Array, ""]:
    """Return ½ vᵀ G v, the mean output KL that the step `vector` costs to second order.

    It needs the forward pass with tangents alone.  It is a prediction: on a saturated model the
    true KL(θ || θ + v) can be larger by orders of magnitude.
    """
    check_likelihood(likelihood)
    number, total = _size(apply, params, batch, likelihood)

    def term(rows: Batch) -> Array:
        outputs, tangent = jax.jvp(lambda p: apply(p, rows.inputs), (params,), (vector,))
        tangent, product = _masked_products(likelihood, rows, outputs, tangent, total)
        return 0.5 * jnp.sum(tangent * product)

    return sum_over_blocks(term, batch, number)


def _size(
    apply: Callable, params: PyTree, batch: Batch, likelihood: Likelihood
) -> tuple[int, Int[Array, ""]]:
    """Return how many blocks a batch is taken in, and how many outputs it counts, or one."""
    check_function(apply)
    check_batch(batch, "batch")
    outputs = jax.eval_shape(apply, params, batch.inputs)
    counted = counted_outputs(batch, likelihood.lead_shape(outputs))
    return num_blocks(outputs), jnp.maximum(jnp.sum(counted), 1)


def _masked_products(
    likelihood: Likelihood, batch: Batch, outputs: Array, tangent: Array, total: Array
) -> tuple[Array, Array]:
    """Return t and H t / M in float32 or wider, zero where an output does not count.

    They are zero by selection and not by product, so that a padded output may hold anything.
    """
    counted = counted_outputs(batch, likelihood.lead_shape(outputs))
    tangent = jnp.where(counted[..., None], wide(tangent), 0)
    product = likelihood.hessian_product(wide(outputs), tangent)
    share = product / total.astype(product.dtype)
    return tangent, jnp.where(counted[..., None], share, 0)
