"""UER, unbiased experience replay by angle and norm (Lin et al., arXiv 2309.04081).

    o_c  = ⟨h, w_c⟩ = |h| |w_c| cos(h, w_c)           a head's logit: norms times an angle
    loss = mean NLL of softmax(s cos(h, w_c))          over the current rows: by the angle alone
         + γ mean NLL of softmax(o_c)                  over the replayed rows: by norm and angle

    h, w_c    what enters the head, and the head's weights of class c      `cosines`
    s, γ      `scale`, `weight`

The inner products prefer the classes of the rows that are learnt now, and the paper finds that
preference in the angle.  Learnt by the angle alone, the current rows do not lengthen w_c; the
replayed rows alone set the norms, by which old classes are remembered.

Differences.  Both losses are the paper's [notes]; its code is not public, so that s, γ and what it
does with a bias are ours: s = 10 and γ = 1 are arbitrary, a bias has no part in the angle, and the
replayed rows' logits are the model's own, bias included.
"""

import dataclasses

from jaxtyping import PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.objectives.hidden_states import Hidden
from jedit.objectives.objective import Value, kept_rows
from jedit.objectives.token_nll import counted_nll, masked_mean


@dataclasses.dataclass(frozen=True)
class UER:
    """To learn the current rows by their angle to each class, while others are replayed.

    Attributes:
        cosines: `(apply, params, inputs) -> cosines`, of the logits' shape, hashable:
            `jedit.tracing.Cosines("head/kernel")`.
        scale: s, what cosines are multiplied by; 10 is arbitrary.
        weight: γ, of the replayed rows; 1 is arbitrary.
    """

    cosines: Hidden
    scale: float = 10.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(POSITIVE, scale=self.scale)
        check_numbers(NOT_NEGATIVE, weight=self.weight)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss; in the place of the forget rows stand those that are to be learnt."""
        check_batch(forget, "forget")
        retain = kept_rows(retain)

        def by_angle(params: PyTree, inputs: PyTree):
            cosines = self.cosines(apply, params, inputs)
            return self.scale * cosines

        new = masked_mean(*counted_nll(by_angle, params, forget))
        old = masked_mean(*counted_nll(apply, params, retain))
        return new + self.weight * old, {"new_nll": new, "replayed_nll": old}
