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
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_batch, check_function
from jedit.core.batch import Batch
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.curvature.likelihoods import Likelihood, check_likelihood


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
    out by `mask` or `valid` contribute an exact zero.
    """
    check_likelihood(likelihood)
    run = _forward(apply, batch)
    outputs, tangent = jax.jvp(run, (params,), (vector,))
    # G = Jᵀ H J: tangents forward, H at the outputs, and cotangents back; J is never formed.
    _, pull_back = jax.vjp(run, params)
    _, product = _masked_products(likelihood, batch, outputs, tangent)
    (product,) = pull_back(product.astype(outputs.dtype))
    return product


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
    outputs, tangent = jax.jvp(_forward(apply, batch), (params,), (vector,))
    tangent, product = _masked_products(likelihood, batch, outputs, tangent)
    return 0.5 * jnp.sum(tangent * product)


def _forward(apply: Callable, batch: Batch) -> Callable[[PyTree], Array]:
    check_function(apply)
    check_batch(batch, "batch")
    return lambda params: apply(params, batch.inputs)


def _masked_products(
    likelihood: Likelihood, batch: Batch, outputs: Array, tangent: Array
) -> tuple[Array, Array]:
    """Return t and H t / M in float32 or wider, zero where an output does not count.

    They are zero by selection and not by product, so that a padded output may hold anything.
    """
    counted = counted_outputs(batch, likelihood.lead_shape(outputs))
    tangent = jnp.where(counted[..., None], wide(tangent), 0)
    product = likelihood.hessian_product(wide(outputs), tangent)
    num_counted = jnp.maximum(jnp.sum(counted), 1).astype(product.dtype)
    return tangent, jnp.where(counted[..., None], product / num_counted, 0)
