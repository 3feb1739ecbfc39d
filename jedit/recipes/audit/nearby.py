"""How near the groups of rows to keep are to the rows to forget, in the original model."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.data import batches
from jedit.recipes.audit.cost import labels_of
from jedit.recipes.audit.parts import FAILURES, described
from jedit.recipes.audit.rows import Rows
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.tracing import Entering, find_sites


def nearness_of(
    model: LanguageModel, params: PyTree, forget: Rows, retain: Rows, field: str
) -> dict[str, float] | str:
    """Return by group of the rows to keep its nearness to those to forget, or why there is none.

    States are those that enter the model's last matrix where a question ends.
    """
    places: dict[str, list[int]] = {}
    for i, label in enumerate(labels_of(retain, field)):
        places.setdefault(label, []).append(i)
    try:
        sites = find_sites(model.apply, params, forget.answers[0].inputs)
        last = [name for name, site in sites.items() if site.kind == "dense"][-1]
        return metrics.nearness(
            model.apply,
            params,
            at_question_ends(model, forget, range(len(forget.rows))),
            {n: at_question_ends(model, retain, rows) for n, rows in places.items()},
            hidden=Entering(last),
        )
    except FAILURES as error:
        return described(error)


def at_question_ends(model: LanguageModel, asked: Rows, places: Sequence[int]) -> Iterator[Batch]:
    """Return batches of the rows at some places, of which the output at a question's end counts.

    They are of one shape for all groups, so that nothing is compiled for a group.
    """
    # By the questions' lengths: of an answer, parts alone may count.
    mask = np.zeros(np.shape(asked.whole.inputs), np.float32)
    mask[np.arange(len(mask)), np.asarray(asked.prompts.lengths) - 1] = 1
    whole = asked.whole._replace(mask=jnp.asarray(mask))
    return batches(whole, model.chunk, order=np.asarray(places))
