"""The grids at which the field has tuned its baselines on TOFU, and its way to train.

    NPO        epochs {5, 10} x rate {1e-5, 2e-5, 5e-5} x alpha {1, 2, 5} x beta {.05, .1, .5}: 54
    AltPO      the same four
    SimNPO     epochs {5, 10} x rate as above x beta {3.5, 4.5} x delta {0, 1} x gamma {.125, .25}
    GradDiff   epochs {5, 10} x rate as above x alpha {1, 2, 5}
    UNDIAL     rate {1e-5, 1e-4, 3e-4} x alpha {1, 2, 5} x beta {3, 10, 30}, 10 epochs
    WGA        alpha {1, .1, 10}, 5 epochs at 1e-5
    SatImp     alpha {1, .1, .01} x beta1 {5, 6}, 5 epochs at 1e-5
    RMU, CE-U, PDU   one point, 10 epochs at 1e-5

Sources.  UNDIAL, WGA, SatImp, CE-U, PDU, and AltPO's rates, alphas and betas: open-unlearning's
`community/methods` [code].  NPO's 54 runs by numbers of values: the card of the 1B model of that
sweep (Forget Quality .967 at utility .548); its values are taken to be AltPO's, of which the names
of published models show most.  SimNPO, GradDiff and all epochs {5, 10}: those names.  For RMU no
grid could be confirmed.

Differences.  CE-U has no retain loss, as there, but counts the answer's first token, which is left
out there.  PDU's lambda waits for five epochs, as there.  RMU steers what enters the last block's
perceptron; there it is what leaves layer 7 of 16.  AltPO runs {5, 10} epochs with the alternates
that it is given; there 2 epochs over five of each answer.

Training is open-unlearning's [code]: AdamW with weight decay 0.01, a warm-up of one epoch, then a
linear fall to zero, gradients clipped to length 1, batches of 32, or of all forget rows where they
are fewer.  To each forget row comes one retain row: there drawn uniformly, here from permutations
of the retain rows, end to end.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import optax

from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import Material, Need
from jedit.methods.trained.pdu import pdu
from jedit.objectives import (
    CEU,
    DPO,
    GA,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    Objective,
    RetainStates,
    SatImp,
    SimNPO,
    with_retain,
)
from jedit.recipes.editing import BATCH, RATE, STEPS
from jedit.recipes.sweep import Point
from jedit.tracing import Entering
from jedit.training import TrainingMethod

BATCH_SIZE, WEIGHT_DECAY, MAX_NORM = 32, 0.01, 1.0
DUAL_WARM_UP = 5  # epochs in which PDU's lambda stays as it is
EPOCHS, RATES, ALPHAS = (5, 10), (1e-5, 2e-5, 5e-5), (1.0, 2.0, 5.0)
ADAMW = optax.inject_hyperparams(
    optax.adamw, static_args=("b1", "b2", "eps", "eps_root", "weight_decay", "nesterov")
)


class Published(NamedTuple):
    """One method's grid: the settings that vary, and the objective at one point of them.

    Attributes:
        grid: the values of each setting.
        objective: makes the objective; None: the method is made in a way of its own.
    """

    grid: Mapping[str, tuple[int | float, ...]]
    objective: Callable[[Point], Objective] | None = None


def _weighed(make: Callable[[Point], Objective], gamma: float = 1.0):
    return lambda p: with_retain(make(p), weight=p["alpha"], forget_weight=gamma)


_COMMON = {"epochs": EPOCHS, RATE: RATES, "alpha": ALPHAS}
_LOW = {RATE: (1e-5,)}
PUBLISHED: Mapping[str, Published] = {
    "NPO": Published(
        {**_COMMON, "beta": (0.05, 0.1, 0.5)}, _weighed(lambda p: NPO(beta=p["beta"]))
    ),
    "AltPO": Published(
        {**_COMMON, "beta": (0.05, 0.1, 0.5)}, _weighed(lambda p: DPO(beta=p["beta"]))
    ),
    "SimNPO": Published(
        {
            "epochs": EPOCHS,
            RATE: RATES,
            "alpha": (1.0,),
            "beta": (3.5, 4.5),
            "delta": (0.0, 1.0),
            "gamma": (0.125, 0.25),
        },
        _weighed(lambda p: SimNPO(beta=p["beta"], delta=p["delta"], gamma=p["gamma"])),
    ),
    "GradDiff": Published(_COMMON, _weighed(lambda _: GA())),
    "UNDIAL": Published(
        {"epochs": (10,), RATE: (1e-5, 1e-4, 3e-4), "alpha": ALPHAS, "beta": (3.0, 10.0, 30.0)},
        _weighed(lambda p: UNDIAL(beta=p["beta"])),
    ),
    "WGA": Published(
        {"epochs": (5,), **_LOW, "alpha": (1.0, 0.1, 10.0)}, _weighed(lambda _: WGA())
    ),
    "SatImp": Published(
        {"epochs": (5,), **_LOW, "alpha": (1.0, 0.1, 0.01), "beta1": (5.0, 6.0)},
        _weighed(lambda p: SatImp(beta_saturation=p["beta1"]), 0.1),
    ),
    "CE-U": Published({"epochs": (10,), **_LOW}, lambda _: CEU()),
    "PDU": Published({"epochs": (10,), **_LOW}),
    "RMU": Published({"epochs": (10,), **_LOW, "steering": (2.0,)}),
}


def published_points(name: str, num_forget: int) -> list[dict[str, int | float]]:
    """Return the points of a method's published grid; an epoch is the forget rows once.

    Raises:
        ValueError: there is no published grid for the method.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name}: has no published grid; there is one for {', '.join(PUBLISHED)}")
    grid = PUBLISHED[name].grid
    size = min(BATCH_SIZE, num_forget)
    found = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        steps = max(1, round(point["epochs"] * num_forget / size))
        found.append({**point, STEPS: steps, BATCH: size})
    return found


def published_method(name: str, material: Material, point: Point) -> TrainingMethod:
    """Make a method at a point of its published grid, to be trained as the field does."""
    optimizer = adamw(int(point[STEPS]), max(1, round(point[STEPS] / point["epochs"])))
    if name == "PDU":
        delay = round(DUAL_WARM_UP * point[STEPS] / point["epochs"])
        return pdu(optimizer, **{**CATALOGUE[name].settings, "delay": delay})
    if name == "RMU":
        hidden = Entering(material.take(Need.HIDDEN_SITE))
        rmu = RMU(hidden, seed=0, steering=float(point["steering"]))
        return TrainingMethod(with_retain(rmu, RetainStates(hidden)), optimizer)
    objective = PUBLISHED[name].objective
    assert objective is not None
    return TrainingMethod(objective(point), optimizer)


@functools.cache  # optimizers are compared by identity
def adamw(steps: int, warm_up: int) -> optax.GradientTransformation:
    """Return open-unlearning's optimizer, whose peak rate stands in its state."""
    shape = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, warm_up),
            optax.linear_schedule(1.0, 0.0, max(1, steps - warm_up)),
        ],
        [warm_up],
    )
    return optax.chain(
        optax.clip_by_global_norm(MAX_NORM),
        ADAMW(learning_rate=1e-5, weight_decay=WEIGHT_DECAY),
        optax.scale_by_schedule(shape),
    )
