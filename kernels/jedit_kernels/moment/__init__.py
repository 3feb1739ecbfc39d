"""The second moment aᵀa of many rows, added to a running sum: K-FAC's arithmetic.

    total_ij += Σ_n m_n a_ni a_nj        for i >= j

The moment is symmetric, so only tiles on and below the diagonal are computed.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jedit_kernels.choice import choose
from jedit_kernels.moment.mosaic import moment_mosaic
from jedit_kernels.moment.xla import moment_xla

# Compute capabilities of the GPUs where the kernel has been measured faster than XLA: none yet.
FASTER_ON: frozenset[str] = frozenset()
# A narrower moment has fewer tiles of 256 columns than there are multiprocessors to give them to.
LEAST_COLUMNS = 2048


def moment(
    total: Float[Array, "layers d d"],
    rows: Float[Array, "layers n d"],
    mask: Bool[Array, "layers n"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "layers d d"]:
    """Add the lower triangle of Σ_n a aᵀ to a running sum; what is above it means nothing.

    Costs half of 2 n d² flops a layer, and a little for the diagonal tiles. Masked rows do not
    enter, whatever they hold, NaN included.

    Args:
        total: a sum in float32 or wider. Products of narrower rows are summed in its dtype.
        rows: "xla" takes any dtype not wider than `total`, "mosaic" bfloat16 or float16.
        mask: False for rows that are left out; None for none.
        implementation: "xla", "mosaic" (NVIDIA Hopper), or None: "mosaic" from 2,048 columns on, on
            GPUs where it has been measured faster, else "xla".

    Returns:
        The new total.

    Raises:
        ValueError: an unknown `implementation`; or "mosaic" with another dtype or an old JAX.
    """
    faster_on = FASTER_ON if rows.shape[-1] >= LEAST_COLUMNS else frozenset()
    if choose(implementation, faster_on, rows) == "mosaic":
        return moment_mosaic(total, rows, mask)
    if mask is not None:
        rows = jnp.where(mask[..., None], rows, jnp.zeros((), rows.dtype))
    return moment_xla(total, rows)


__all__ = ["moment"]
