"""Gradient ascent on the forget set: loss = -mean NLL_f, over the forget tokens that count.

Nothing bounds it from below, and nothing protects the retain set: it is the floor that the other
methods are compared with.
"""

from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.objectives.token_nll import Apply, counted_nll, masked_mean


def ga(
    params: PyTree, forget: Batch, retain: Batch | None = None, *, apply: Apply
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return -mean NLL of the forget batch, and the mean itself; `retain` is not looked at."""
    del retain
    forget_nll = masked_mean(*counted_nll(params, forget, apply=apply))
    return -forget_nll, {"forget_nll": forget_nll}
