"""Presets of TOFU: the size of a run, and the settings that the methods are tried at."""

from typing import Literal, NamedTuple

from jedit.data.benchmarks import TOFU_AUTHORS
from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import BySteps, Need, Pace, Reach
from jedit.recipes.comparison.task import ASIDE, SHARES, Grid
from jedit.recipes.fitting import Recipe
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.attacks import RELEARNING_RATE
from jedit.recipes.tofu.models import Pretrained

Protocol = Literal["strict", "field"]


class Preset(NamedTuple):
    """The size of a run of TOFU, and the settings that its methods are tried at.

    Attributes:
        authors: number of authors that the model learns, the forgotten ones included.
        forgotten: number of authors to forget, the last ones of TOFU's, at most 20.
        questions: number of questions of each set that judge the points, at most.
        model: the GPT's size, or how a folder's model is run.
        recipe: how the model is trained.
        grid: settings that the methods are tried at.
        dtype: dtype of the computation; parameters stay in float32, statistics too.
        relearning_rate: learning rate of the attack that trains the model again.
        protocol: "strict": six retain authors are held out of all methods' sight, and judge them;
            "field": methods see all retain rows, those that judge them too, as the field does.
    """

    authors: int
    forgotten: int
    questions: int
    model: Model | Pretrained
    recipe: Recipe
    grid: Grid
    dtype: str = "float32"
    relearning_rate: float = RELEARNING_RATE
    protocol: Protocol = "strict"


# Four points for each method: two settings at two strengths, or four strengths. What bounds its own
# objective takes the larger rates; what does not, and GU in its own metric, is lost at them.
RATES = {
    Pace.PLAIN_ASCENT: (1e-4, 3e-4),
    Pace.UNBOUNDED: (1e-4, 3e-4),
    Pace.BOUNDED: (3e-4, 1e-3),
    Pace.ADAM_METRIC: (3e-5, 1e-4),
    Pace.PREDICTED_KL: (5e-5, 1e-4),
    Pace.STEP_LENGTH: (0.1, 0.3),
}
OWN_UNITS = {Pace.PREDICTED_KL, Pace.STEP_LENGTH}
# NPO by natural steps at the beta alone that goes far enough. Second-order steps are left to those
# who name them: one of OFMU costs some twenty gradients, one of Ssiuu differentiates every row.
LEFT_OUT = ASIDE | {"NPO (natural)", "OFMU", "Ssiuu", "Ssiuu (log)"}
# What can be named: all but what has no rates here, or asks for rows about unknown authors.
KNOWN = tuple(
    row.name
    for row in CATALOGUE.values()
    if Need.LATENTS not in row.needs and not (isinstance(row, BySteps) and row.pace not in RATES)
)
GRID = Grid(
    methods=tuple(name for name in CATALOGUE if name not in LEFT_OUT),
    budgets=(0.05, 0.1, 0.2, 0.4),
    temperatures=(1.0,),  # the GPT is not saturated: tempering would cost utility
    damping=(0.1,),
    kfade_steps=(1,),
    looks=(16, 48),
    batch_size=16,
    kl_budget=0.5,
    rates=RATES,
    scales={
        Reach.WHOLE: (0.2, 0.5, 1.0, 1.5),
        Reach.FACTS: (0.3, 1.0, 2.0, 4.0),
        Reach.SHARE: SHARES,
    },
    utility_share=0.8,
    lost_kl=1.0,  # no model that far off kept four fifths of its utility
)
# Pretrained models take rates some thirty times as small: open-unlearning trains TOFU's, and
# unlearns, at 1e-5. A predicted KL is the same for every model, and so is, about, a step's length.
FINE_TUNING = GRID._replace(
    temperatures=(1.0, 4.0),  # a pretrained model may know its authors by heart
    rates={
        pace: rates if pace in OWN_UNITS else tuple(rate / 30 for rate in rates)
        for pace, rates in RATES.items()
    },
)
PRESETS = {
    "cpu": Preset(
        authors=60,
        forgotten=6,
        questions=40,
        model=Model(width=160, layers=4, heads=4, vocab=2048, max_len=176),
        recipe=Recipe(epochs=(12,), batch_size=8, learning_rate=1e-3),
        grid=GRID,
    ),
    "gpu": Preset(
        authors=TOFU_AUTHORS,
        forgotten=20,
        questions=400,
        model=Model(width=768, layers=12, heads=12, vocab=8192, max_len=160),
        recipe=Recipe(epochs=(10,), batch_size=16, learning_rate=3e-4),
        grid=GRID,
        dtype="bfloat16",
    ),
    "checkpoint": Preset(
        authors=TOFU_AUTHORS,
        forgotten=20,
        questions=400,
        model=Pretrained(max_len=256, chunk=8),
        recipe=Recipe(epochs=(5,), batch_size=16, learning_rate=1e-5),
        grid=FINE_TUNING,
        dtype="bfloat16",
        relearning_rate=1e-5,
    ),
}
