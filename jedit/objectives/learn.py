"""The plain loss of learning: the mean NLL of the rows to be learnt.

For a model that learns on (`jedit.recipes.learning_on`), where the rows of the task stand in the
place of those to be forgotten, and rows of earlier tasks in that of those to be kept: replay is
`with_retain(LearnNLL())`.
"""

import dataclasses

from jaxtyping import PyTree

from jedit.core.batch import Apply, Batch
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import counted_nll, masked_mean


@dataclasses.dataclass(frozen=True)
class LearnNLL:
    """The mean NLL of the first batch, the rows to be learnt."""

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: PyTree = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss; the retain rows and the reference are not looked at."""
        loss = masked_mean(*counted_nll(apply, params, forget))
        return loss, {"task_nll": loss}
