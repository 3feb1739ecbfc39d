"""Gradient ascent on the forget set: loss = -mean NLL_f, over the forget tokens that count.

Nothing bounds it from below, and nothing protects the retain set: it is the floor that the other
methods are compared with.  Gradient difference is `with_retain(GA())`.
"""

import dataclasses

from jaxtyping import PyTree

from jedit.core.batch import Apply, Batch
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import counted_nll, masked_mean


@dataclasses.dataclass(frozen=True)
class GA:
    """Gradient ascent."""

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return -mean NLL of the forget batch, and the mean itself."""
        forget_nll = masked_mean(*counted_nll(apply, params, forget))
        return -forget_nll, {"forget_nll": forget_nll}
