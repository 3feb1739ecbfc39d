"""The sum of squared per-example gradients: EK-FAC's spectrum and the Fisher's diagonal.

    total_ij += Σ_n ( Σ_s a_nsi g_nsj )²

No two examples' gradients coexist; on Hopper not one of them is ever in memory.
"""

from jaxtyping import Array, Float

from jedit_kernels.choice import choose
from jedit_kernels.squared_gradient_sum.mosaic import squared_gradient_sum_mosaic
from jedit_kernels.squared_gradient_sum.xla import squared_gradient_sum_xla

# Compute capabilities of the GPUs where the kernel has been measured faster than XLA: none yet.
FASTER_ON: frozenset[str] = frozenset()


def squared_gradient_sum(
    total: Float[Array, "layers d_in d_out"],
    a: Float[Array, "layers n s d_in"],
    g: Float[Array, "layers n s d_out"],
    *,
    implementation: str | None = None,
) -> Float[Array, "layers d_in d_out"]:
    """Add Σ_n (a_nᵀ g_n)² elementwise to a running sum. Costs 2 n s d_in d_out flops a layer.

    A position that is no data must be zero in `a` and in `g`.

    Args:
        total: a sum in float32 or wider. Products of narrower operands are summed in its dtype.
        a: inputs of a linear map at the s positions of n examples.
        g: gradients at its output. "mosaic" takes both in bfloat16, or both in float16.
        implementation: "xla", "mosaic" (NVIDIA Hopper), or None: "mosaic" on GPUs where it has been
            measured faster, else "xla".

    Returns:
        The new total.

    Raises:
        ValueError: an unknown `implementation`; or "mosaic" with other dtypes or an old JAX.
    """
    if choose(implementation, FASTER_ON, a, g) == "mosaic":
        return squared_gradient_sum_mosaic(total, a, g)
    return squared_gradient_sum_xla(total, a, g)


__all__ = ["squared_gradient_sum"]
