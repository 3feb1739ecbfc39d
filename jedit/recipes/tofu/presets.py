"""How large a run of TOFU is, and what the methods are tried at."""

from typing import NamedTuple

from jedit.data.benchmarks import TOFU_AUTHORS
from jedit.recipes.comparison.compare import BY_GU, SOFT_NATURAL, Grid, with_all_methods
from jedit.recipes.comparison.trained import SOFT
from jedit.recipes.fitting import Recipe
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.attacks import RELEARNING_RATE
from jedit.recipes.tofu.models import Pretrained


class Preset(NamedTuple):
    """How large a run is.

    Attributes:
        authors: how many the model learns, the forgotten ones included.
        forgotten: the last so many of TOFU's, at most 20.
        questions: of each set that judges the points, at most.
        model: the GPT's size, or how a folder's model is run.
        recipe: of the training.
        grid: what the methods are tried at.
        dtype: of the computation; parameters stay in float32, statistics too.
        relearning_rate: of the attack that trains the model again.
    """

    authors: int
    forgotten: int
    questions: int
    model: Model | Pretrained
    recipe: Recipe
    grid: Grid
    dtype: str = "float32"
    relearning_rate: float = RELEARNING_RATE


# Four points for each method: two settings at two strengths, or four strengths. What bounds its own
# objective takes the larger rates; what does not, and GU in its own metric, is lost at them.
BOUNDED, UNBOUNDED, BY_GU_RATES = (3e-4, 1e-3), (1e-4, 3e-4), (3e-5, 1e-4)
PREDICTED_KL = (1.5e-4, 3e-4)  # of a natural step
SOFT_NPO = f"NPO (beta {SOFT:g})"
GRID = with_all_methods(
    Grid(
        budgets=(0.05, 0.1, 0.2, 0.4),
        temperatures=(4.0,),
        damping=(0.1,),
        kfade_steps=(1,),
        learning_rates=dict.fromkeys(("gradient ascent", "GradDiff", "NPO", SOFT_NPO), UNBOUNDED)
        | {SOFT_NATURAL: PREDICTED_KL},
        looks=(8, 24),
        batch_size=16,
        kl_budget=0.5,
        utility_share=0.8,
        lost_kl=1.0,  # no model that far off kept four fifths of its utility
    ),
    BOUNDED,
    (0.2, 0.5, 1.0, 1.5),
    "IdkDPO",
)
ASCENDING = ("WGA", "SAM", "UAM", "ROSU", "ROSU (push)", "null-space GradDiff")
GRID = GRID._replace(
    scales=GRID.scales | dict.fromkeys(("AlphaEdit", "MEMIT"), (0.3, 1.0, 2.0, 4.0)),
    learning_rates=GRID.learning_rates
    | dict.fromkeys(ASCENDING, UNBOUNDED)
    | dict.fromkeys(BY_GU, BY_GU_RATES),
)
# Pretrained models take rates some thirty times as small: open-unlearning trains TOFU's, and
# unlearns, at 1e-5.
FINE_TUNING = GRID._replace(
    learning_rates={
        name: rates if name == SOFT_NATURAL else tuple(rate / 30 for rate in rates)
        for name, rates in GRID.learning_rates.items()
    }
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
