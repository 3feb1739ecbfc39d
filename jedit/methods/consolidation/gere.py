"""GeRe as a method: to learn on while general texts are replayed (arXiv 2508.04676).

The equation, its symbols and what is confirmed stand where its loss is, in
`jedit.objectives.gere`.
"""

import functools

import optax
from jaxtyping import PyTree

from jedit.core.arguments import check_batch, check_optimizer
from jedit.core.batch import Apply, Batch
from jedit.core.checks import POSITIVE, check_numbers
from jedit.objectives import GeRe, ReplayedStates, replayed_states
from jedit.objectives.hidden_states import Hidden
from jedit.training.method import TrainingMethod


def gere(
    hidden: Hidden,
    optimizer: optax.GradientTransformation,
    *,
    weight: float = 100.0,
    spread: float = 1.0,
) -> TrainingMethod:
    """Make GeRe around any optimizer.

        method = gere(Entering("head/kernel"), optax.adam(1e-4))
        params, _ = jedit.unlearn(method, apply, params, new_rows, general, steps=100, key=key)

    Args:
        hidden: `(apply, params, inputs) -> states`, hashable; the code's is what enters the head.
        optimizer: learning rate included.
        weight: w, of the margin; 100, the code's.
        spread: κ, how many deviations from the mean a band ends; 1, the code's.

    Returns:
        A method for `jedit.unlearn`, which takes the rows that are learnt for the forget set and
        those that are replayed for the retain set. Before the first step it looks at the hidden
        states of all of those, twice, where they are not `ReplayedStates` already: under the
        parameters that it begins with. Over a stream of tasks that is the model after each task,
        and the bands drift with it; give it `replayed_states` that were noted once, as
        `jedit.recipes.learners.KeepGeneral(size, hidden)` keeps them.

    Raises:
        ValueError: a number is out of its range.
    """
    check_optimizer(optimizer)
    check_numbers(POSITIVE, spread=spread)
    prepare = functools.partial(_looked_at, hidden, spread)
    return TrainingMethod(GeRe(hidden, weight), optimizer, prepare=prepare)


def _looked_at(
    hidden: Hidden,
    spread: float,
    apply: Apply,
    reference: PyTree,
    forget: Batch,
    retain: Batch | ReplayedStates,
) -> tuple[Batch, ReplayedStates]:
    if isinstance(retain, ReplayedStates):
        return forget, retain
    check_batch(retain, "retain")
    return forget, replayed_states(hidden, apply, reference, retain, spread=spread)
