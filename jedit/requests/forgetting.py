"""Settings of `forget`: how it steps, and what it is stopped and judged by."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jaxtyping import PyTree

from jedit.core.arguments import check_checkpoint, check_function, check_kind, check_params
from jedit.core.batch import Batch, Resumable
from jedit.core.checks import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, check_numbers
from jedit.core.display import short_repr
from jedit.curvature import Curvature, Factorize
from jedit.curvature.likelihoods import Likelihood
from jedit.objectives import NPO, Objective, with_retain
from jedit.objectives.held import WithRetain
from jedit.requests.walk import Look
from jedit.training import TrainingMethod


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Settings of Adam's steps after natural ones (ours).

    Natural steps end at a retain loss that their metric holds and does not lower; NPO has saturated
    there, so that the retain term, at full weight, has its way. Alone it would bring the rows back.

    Attributes:
        steps: number of steps, after those of `Forgetting.steps`; 48, on TOFU in small.
        predicted_kl: predicted retain KL of the first step, 1e-4, nats per output; it falls to
            nothing at the last, as `transforms.falling` says. Adam gives the direction alone.
        forget_weight: γ, of the objective on the forget rows beside its retain term; 0.2.
        batch_size: forget rows, and retain rows, of one step; 16.
    """

    steps: int = 48
    predicted_kl: float = 1e-4
    forget_weight: float = 0.2
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, steps=self.steps, batch_size=self.batch_size)
        check_numbers(POSITIVE, predicted_kl=self.predicted_kl)
        check_numbers(NOT_NEGATIVE, forget_weight=self.forget_weight)


@dataclasses.dataclass(frozen=True, eq=False)
class Rewind:
    """Settings of a way back towards a model that never saw the rows, before natural steps (ours).

    Natural steps and their recovery leave the model where it was, a short way off, and whoever
    relearns a few of the rows has the others back: on TOFU in small a probability of .4 of them.
    What comes back falls with how far the whole model moves.  So the weights are drawn back to
    where the rows were not known, and trained on from there, on what is to be kept and away from
    the rows, for a part of what retraining takes; natural steps at the end bring back what this
    cost, unless the rows are like unseen ones by then.  What no retain row that it sees holds and
    `start` does not know either is lost: give rows of all that is to be kept.  There is one look,
    at its end.  Kin: Rewind-to-Delete (arXiv 2409.09778), which trains on the retain rows alone,
    from a checkpoint.

    Attributes:
        start: parameters of a model that never saw the rows: of a fine-tuned one, its base; of one
            trained from nothing, those that its training began with. Others cost too much.
        learning_rate: Adam's, at its height after a sixth of the steps; a cosine to nothing
            follows. On TOFU in small twice the rate that the model was trained by.
        steps: number of steps; a fifth of retraining's at a share of 0.3, and two fifths at 0.6,
            left the utility of a retrained model.
        share: of the way from the given parameters to `start`, 0.6 (ours).
        forget_weight: γ, of the objective on the forget rows beside its retain term; 0.3. At 0 the
            rows are not looked at, which is cheaper by their part of a step, and lasts as long.
        batch_size: forget rows, and retain rows, of one step; 8.
    """

    start: PyTree
    learning_rate: float
    steps: int
    share: float = 0.6
    forget_weight: float = 0.3
    batch_size: int = 8

    __repr__ = short_repr

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_params(self.start, "start")
        check_numbers(COUNT, steps=self.steps, batch_size=self.batch_size)
        check_numbers(POSITIVE, learning_rate=self.learning_rate)
        check_numbers(SHARE, share=self.share)
        check_numbers(NOT_NEGATIVE, forget_weight=self.forget_weight)


@dataclasses.dataclass(frozen=True, eq=False)
class Natural:
    """Settings of the natural steps that `forget` takes; the defaults are those of our tables.

    Attributes:
        objective: what is lowered, best one that saturates; NPO at beta 0.04 with the retain loss.
        curvature: of the retain outputs; None: K-FAC is estimated of the retain rows that are not
            held out, where the steps begin; a `Factorize`: likewise, its factors kept so, of which
            damped solves are all that is made. The optimizer's state holds two copies of it.
        select: regular expression; a parameter in whose path it is not found is not edited, but by
            a rewind. It is looked at where the curvature is estimated.
        damping: λ, in units of each block's mean eigenvalue; 0.01 is `natural`'s.
        predicted_kl: predicted retain KL of the first step at most, nats per output, 1e-4 as there;
            it falls to nothing at the last, as `transforms.falling` says.
        batch_size: forget rows, and retain rows, of one step; 16, as there.
        recovery: settings of what follows them; None: nothing does.
        rewind: settings of what they follow; None: they begin at the given params.
    """

    objective: Objective = with_retain(NPO(beta=0.04))  # noqa: RUF009 - frozen and hashable
    curvature: Curvature | Factorize | None = None
    select: str | None = None
    damping: float = 0.01
    predicted_kl: float = 1e-4
    batch_size: int = 16
    recovery: Recovery | None = Recovery()
    rewind: Rewind | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            TypeError: a rewind of another type.
            ValueError: a number out of its range, by its name, or a recovery or a rewind without a
                retain term.
        """
        if self.rewind is not None:
            check_kind(self.rewind, Rewind, "rewind", "such as Rewind(base, 2e-5, steps=100)")
        check_function(self.objective, "objective", "(apply, params, forget, retain, reference)")
        for name in ("recovery", "rewind"):
            if getattr(self, name) is not None and not isinstance(self.objective, WithRetain):
                raise ValueError(
                    f"{name} weighs an objective against its retain term, so the objective has to "
                    f"be made by with_retain; give {name}=None to go without"
                )
        check_numbers(NOT_NEGATIVE, damping=self.damping)
        check_numbers(POSITIVE, predicted_kl=self.predicted_kl)
        check_numbers(COUNT, batch_size=self.batch_size)


class Watching(NamedTuple):
    """The observer of `forget`, and what its job is saved by.

    Attributes:
        callback: a function that is told of every `Look`; it may raise. None: nobody is told.
        checkpoint: a `jedit.Checkpoint`, which saves the curvature and the steps in parts; the same
            call goes on from the last save, to the bit. An attack is not saved.
    """

    callback: Callable[[Look], Any] | None = None
    checkpoint: Resumable | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Forgetting:
    """Settings of `forget`: how it steps, and what it is stopped and judged by.

    Attributes:
        method: settings of the natural steps; or any other `TrainingMethod`, which the same rows
            then stop.
        likelihood: what the outputs mean; None: `Categorical`, at the temperature of
            `choose_temperature`. The temperature is the metric's alone: the price is of the outputs
            as they are.
        steps: number of steps at most, without those of a rewind and those of a recovery; 48 was
            enough on TOFU in small (ours).
        every: number of steps between two looks at the rows and at the price; 4 is arbitrary.
        significance: the edit stops when the test's p-value is above it; 0.05 is
            also what Forget Quality is held against.
        heldout: retain rows on which the price is measured; None: a tenth of them, 64 at most, at
            equal distances, which no step and no curvature sees.
        attack: the optimizer of a relearning attack on the result; None: it is not attacked.
        watch: who is told of the looks, and where the job is saved; None: nobody, and nowhere.
    """

    method: Natural | TrainingMethod = Natural()  # noqa: RUF009 - frozen
    likelihood: Likelihood | None = None
    steps: int = 48
    every: int = 4
    significance: float = 0.05
    heldout: Batch | None = None
    attack: optax.GradientTransformation | None = None
    watch: Watching | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        if isinstance(self.method, TrainingMethod) and self.method.pairing is not None:
            raise ValueError(
                "a pairing counts the rows of the sets that it was made for, and forget draws rows "
                "again and holds some out; run such a method by jedit.unlearn"
            )
        check_numbers(COUNT, steps=self.steps, every=self.every)
        check_numbers(SHARE, significance=self.significance)
        if self.watch is not None:
            check_kind(self.watch, Watching, "watch", "such as Watching(checkpoint=job)")
            check_checkpoint(self.watch.checkpoint)
