"""The sum of squared gradients as an XLA program: example by example through one buffer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


def squared_gradient_sum_xla(
    total: Float[Array, "layers d_in d_out"],
    a: Float[Array, "layers n s d_in"],
    g: Float[Array, "layers n s d_out"],
) -> Float[Array, "layers d_in d_out"]:
    """Add Σ_n (a_nᵀ g_n)²; one product of squares when every example is one position."""
    if a.shape[2] == 1:
        a, g = (x[:, :, 0].astype(total.dtype) ** 2 for x in (a, g))
        return total + jnp.einsum("lni,lno->lio", a, g, precision=HIGHEST)

    def example(total, one):
        gradient = jnp.einsum(
            "lsi,lso->lio", *one, precision=HIGHEST, preferred_element_type=total.dtype
        )
        return total + gradient**2, None

    by_example = jnp.moveaxis(a, 1, 0), jnp.moveaxis(g, 1, 0)
    return jax.lax.scan(example, total, by_example)[0]
