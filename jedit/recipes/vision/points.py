"""What every method of the vision protocol is tried at.

Two choices. "published": one point each, the papers' own where they are known, and UAM's (SGD, rate
0.01, 5 epochs, batches of 128) for the others that train. "grid": four to six strengths each, of
which the one nearest to retrained on a seed of its own is reported; as far apart for every method,
and two values of a second setting where a paper's method has one that decides. Methods that were
nearest at the end of a shorter grid, in `tests.bench.claims.vision`, have the longer ones.

    fine-tune          rate 0.01, 10 epochs        SalUn's code, README
    gradient ascent    rate 1e-4, 5 epochs         SalUn's code, README; of the forget rows
    SalUn              rate 0.1, 10 epochs         SalUn's code, README
    random label       rate 0.1, 10 epochs         as SalUn, which is that behind a mask
    l1-sparse          rate 0.01, 10 epochs        SalUn's code, README; its strength is not there
    UAM, ROSU          rate 0.01, 5 epochs         UAM's paper; the radius is not known to us

Differences: of "published" the rates and the epochs alone are the papers'. Ours, and the same for
all methods, are batches of as many forget rows as retain rows (an epoch is a pass over the retain
rows, in which forget rows come several times), one labelling of the random labels for the whole
run, a rate that does not fall, and images that are neither cropped nor mirrored.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import optax

from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import ByBudget, ByScale, BySteps, Need, Pace, Reach, Row
from jedit.recipes.comparison.task import SHARES
from jedit.recipes.editing import BATCH, BUDGET, RATE, RATES, SCALE, STEPS
from jedit.recipes.sweep import Point
from jedit.recipes.vision.training import MOMENTUM, WEIGHT_DECAY

Points = Literal["grid", "published"]
# Passes over the retain rows, and over the forget rows.
EPOCHS, FORGET_EPOCHS = "epochs", "forget_epochs"
# What a classifier has; a need that is added to the catalogue is no matter of it until named here.
HAS = frozenset(
    {
        *(Need.CURVATURE, Need.CORRECTED, Need.TARGET_MOMENTS, Need.REST_MOMENTS),
        *(Need.HIDDEN_SITE, Need.LAYERS, Need.SUBJECTS, Need.NUM_CLASSES, Need.RETAIN, Need.STEPS),
    }
)
# What runs unless others are asked for: all that can, but for ROME, which writes one fact after
# another, and those that differ from a row there in a setting alone.
METHODS = tuple(
    row.name
    for row in CATALOGUE.values()
    if row.needs <= HAS and row.name not in {"ROME", "NPO (natural)"}
)
PUBLISHED_EPOCHS = 5.0
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "fine-tune": {RATE: 0.01, EPOCHS: 10.0},
    "gradient ascent": {RATE: 1e-4, FORGET_EPOCHS: 5.0},
    "random label": {RATE: 0.1, EPOCHS: 10.0},
    "SalUn": {RATE: 0.1, EPOCHS: 10.0},
    "l1-sparse": {RATE: 0.01, EPOCHS: 10.0},
    "UAM": {RATE: 0.01, EPOCHS: 5.0},
    "ROSU": {RATE: 0.01, EPOCHS: 5.0},
}
# Of SGD with momentum 0.9, but for the methods whose step is their own.
GRID_RATES: Mapping[Pace, tuple[float, ...]] = {
    Pace.PLAIN_ASCENT: (3e-5, 1e-4, 3e-4, 1e-3),
    Pace.UNBOUNDED: (1e-3, 3e-3, 0.01, 0.03),
    Pace.BOUNDED: (1e-3, 3e-3, 0.01, 0.03),
    Pace.DESCENT: (0.01, 0.03, 0.1, 0.3, 1.0),
    Pace.ADAM_METRIC: (1e-5, 3e-5, 1e-4, 3e-4),
    Pace.PREDICTED_KL: (1e-5, 1e-4, 1e-3, 1e-2),
    Pace.STEP_LENGTH: (3e-3, 0.01, 0.03, 0.1),
}
# Their rates are no learning rates of SGD.
OWN_UNITS = frozenset({Pace.ADAM_METRIC, Pace.PREDICTED_KL, Pace.STEP_LENGTH})
GRID_SCALES: Mapping[Reach, tuple[float, ...]] = {
    Reach.WHOLE: (0.3, 0.6, 1.0, 1.5, 2.2, 3.0),
    Reach.FACTS: (0.1, 0.3, 1.0, 3.0),
    Reach.SHARE: SHARES,
}
GRID_BUDGETS = (1e-3, 1e-2, 3e-2, 0.1)
# Where a second setting decides, two values of it at two or three rates.
NEAR, FAR = (3e-3, 0.01), (0.01, 0.03, 0.1)
SECOND: Mapping[str, tuple[str, tuple[float, float], tuple[float, ...]]] = {
    "random label": ("forget_weight", (0.1, 1.0), NEAR),
    "SalUn": ("forget_weight", (0.1, 1.0), NEAR),
    "l1-sparse": ("strength", (1e-3, 1e-2), (0.03, 0.1, 0.3)),
    "UAM": ("radius", (0.1, 1.0), FAR),
    "ROSU": ("radius", (0.1, 1.0), FAR),
    "ROSU (push)": ("radius", (0.1, 1.0), FAR),
}
# The rate stands in the state, so that a grid of them compiles once.
SGD = optax.inject_hyperparams(
    lambda learning_rate: optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(learning_rate, momentum=MOMENTUM)
    )
)(learning_rate=0.01)


def points_of(row: Row, points: Points, *, epochs: float, batch_size: int) -> list[dict[str, Any]]:
    """Return the points that a method is tried at.

    Args:
        row: the method.
        points: the choice.
        epochs: passes over the retain rows on the grid.
        batch_size: forget rows, and retain rows, of one step.

    Returns:
        The points, each a dict of numbers; `with_steps` says what an epoch is.

    Raises:
        ValueError: a method whose strength is neither steps, a scale nor a budget.
    """
    own = {k: v for k, v in row.settings.items() if isinstance(v, int | float)}
    if isinstance(row, BySteps):
        rate = RATES.get(row.pace, RATE)
        if points == "published":
            theirs = PUBLISHED.get(row.name, {EPOCHS: PUBLISHED_EPOCHS})
            usual = GRID_RATES[row.pace][1] if row.pace in OWN_UNITS else 0.01
            return [{rate: usual, **own, BATCH: batch_size, **theirs}]
        fixed = {**own, EPOCHS: epochs, BATCH: batch_size}
        if row.name not in SECOND:
            return [{**fixed, rate: value} for value in GRID_RATES[row.pace]]
        name, values, rates = SECOND[row.name]
        return [{**fixed, rate: r, name: value} for value in values for r in rates]
    if isinstance(row, ByScale):
        scales = (1.0,) if points == "published" else GRID_SCALES[row.reach]
        return [{**own, SCALE: scale} for scale in scales]
    if not isinstance(row, ByBudget):  # such as RULE, whose strength is none of these
        raise ValueError(f"{row.name} has no points for images; run the others (--methods)")
    budgets = (0.03,) if points == "published" else GRID_BUDGETS  # the price is the user's to state
    return [{**own, BUDGET: budget} for budget in budgets]


def with_steps(point: Point, num_forget: int, num_retain: int) -> Point:
    """Return a point as an editor takes it, its epochs as steps."""
    for name, rows in ((EPOCHS, num_retain), (FORGET_EPOCHS, num_forget)):
        if name in point:
            steps = math.ceil(point[name] * rows / min(int(point[BATCH]), rows))
            return {**{k: v for k, v in point.items() if k != name}, STEPS: steps}
    return point
