"""What a comparison is given: a task, and a grid of what every method is tried at."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from jedit.core.batch import Batch
from jedit.curvature import Factorize
from jedit.methods.row import Pace, Reach
from jedit.objectives import Dialogue

# What the demo runs unless it is asked for all.
MAIN = ("K-FADE (K-FAC)", "K-FADE (EK-FAC)", "gradient ascent", "GradDiff", "NPO")


# What `--methods all` leaves out: baselines that do not look at the forget rows, ROME, which writes
# one fact after another, SalUn, random labels behind a mask, and two that want more than the sets:
# Attention-Shifting a forward pass of every row for each of its tokens, SAE-guided unknown rows.
ASIDE = frozenset({"Attention-Shifting", "fine-tune", "l1-sparse", "ROME", "SAE-guided", "SalUn"})


# Scales of a pruning's own share, from a part of it to ten times as much; arbitrary.
SHARES = (0.3, 1.0, 3.0, 10.0)


class Grid(NamedTuple):
    """What every method is tried at; it is written into the report.

    Attributes:
        methods: names of the catalogue's rows that are run, in that order.
        budgets: strengths of K-FADE, true retain KL in nats per output.
        temperatures: of the likelihood whose curvature K-FADE steps in.
        damping: of K-FADE.
        kfade_steps: numbers of steps of one edit.
        looks: strengths of the methods that train, in optimizer steps.
        batch_size: forget rows, and retain rows, of one such step.
        kl_budget: the held-out retain KL under which a best point is chosen.
        rates: learning rates of the methods that train, by their pace.
        scales: what a method's one edit, or its share, is multiplied by, by its reach.
        utility_share: None, or what a best point has to keep of the Model Utility; see
            `QUALITY_RULE`.
        lost_kl: the held-out retain KL beyond which Model Utility is not measured.
        factorize: how the factors of the curvatures are kept.
        draws: strengths of RULE, rising; 20 is its code's, the others tell what comes before.
    """

    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    temperatures: tuple[float, ...]
    damping: tuple[float, ...]
    kfade_steps: tuple[int, ...]
    looks: tuple[int, ...]
    batch_size: int
    kl_budget: float
    rates: Mapping[Pace, tuple[float, ...]] = {}
    scales: Mapping[Reach, tuple[float, ...]] = {}
    utility_share: float | None = None
    lost_kl: float = math.inf
    factorize: Factorize = Factorize()
    draws: tuple[int, ...] = (5, 10, 20)


class Task(NamedTuple):
    """A model, what it was trained on, and what of it is to be forgotten.

    Attributes:
        apply: `apply(params, inputs) -> logits`.
        original: the params of the model trained on everything.
        retrained: the params of the one trained without the forget rows; None: nobody compares
            with it.
        forget: rows to be forgotten.
        retain: rows that curvature and edits see.
        heldout: other retain rows of the training set.
        test: rows no model was trained on, or None.
        truth_ratio: params to the truth ratio of each forget row, or None.
        select: regular expression: which parameters K-FADE edits; None: all that can be.
        chunk: rows evaluated at a time.
        probe: how many retain rows the line search measures on.
        hidden_site: what enters this site is the hidden state of RMU.
        layers: paths of the matrices that AlphaEdit and MEMIT edit, by depth.
        refusals: what DPO prefers to the answers of the forget rows, row by row, or None.
        alternates: makes what AltPO prefers to the answers of the forget rows, row by row, where a
            method needs it; or None.
        dialogue: makes what RULE is taught by and asks, where a method needs it; or None.
        utility: params to Model Utility, or None.
        judged_rows: retain and held-out rows that judge a point, the first ones; None: all.
        unknown: rows of the same kind as the forget rows, about what no model knows, or None.
        pack: makes fewer sequences of the rows that judge a point; None: they stay as they are.
    """

    apply: Callable
    original: PyTree
    retrained: PyTree
    forget: Batch
    retain: Batch
    heldout: Batch
    test: Batch | None
    truth_ratio: Callable[[PyTree], np.ndarray] | None
    select: str | None
    chunk: int
    probe: int
    hidden_site: str
    layers: tuple[str, ...]
    refusals: Batch | None = None
    alternates: Callable[[], Batch] | None = None
    dialogue: Callable[[], Dialogue] | None = None
    utility: Callable[[PyTree], float] | None = None
    judged_rows: int | None = None
    unknown: Batch | None = None
    pack: Callable[[Batch], Batch] | None = None
