"""The authors scene: a small GPT learns invented facts about invented authors, and forgets some."""

from jedit.data import generate_authors
from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import Pace, Reach
from jedit.recipes.comparison.task import ASIDE, MAIN, SHARES, Grid
from jedit.recipes.fitting import Recipe
from jedit.recipes.progress import Say
from jedit.recipes.scenes.question_answer import Caption, Model, Selection, question_answer
from jedit.report import Comparison

MODEL = Model(width=96, layers=2, heads=4, vocab=1024, max_len=96)
# After 7 epochs nothing is saturated yet, after 25 the rows are memorised.
RECIPE = Recipe(epochs=(7, 25), batch_size=16, learning_rate=2e-3)
RATES = (1e-4, 3e-4, 1e-3)
SLOW = dict.fromkeys((Pace.PLAIN_ASCENT, Pace.ADAM_METRIC), (3e-5, 1e-4, 3e-4))
OWN_UNITS = {Pace.PREDICTED_KL: (1e-4, 3e-4, 1e-3), Pace.STEP_LENGTH: (0.03, 0.1, 0.3)}
GRID = Grid(
    methods=(*MAIN, "NPO (natural, beta 0.04)"),
    budgets=(0.01, 0.03, 0.07, 0.2),
    temperatures=(1.0, 4.0),
    damping=(0.1,),
    kfade_steps=(1, 4),
    rates=dict.fromkeys(Pace, RATES) | SLOW | OWN_UNITS,
    scales={Reach.WHOLE: (0.03, 0.1, 0.3, 1.0), Reach.FACTS: (0.3, 1.0, 3.0), Reach.SHARE: SHARES},
    looks=(2, 4, 8, 16, 32, 64),
    batch_size=16,
    kl_budget=0.1,
)
# For `jedit demo --methods all`.
ALL = GRID._replace(methods=tuple(name for name in CATALOGUE if name not in ASIDE))


def authors(
    *,
    seed: int,
    say: Say,
    num_authors: int = 30,
    facts_per_author: int = 10,
    num_forgotten: int = 3,
    model: Model = MODEL,
    recipe: Recipe = RECIPE,
    grid: Grid = GRID,
) -> tuple[Comparison, ...]:
    """Generate the authors, train, retrain, edit and compare.

    Args:
        seed: seed of the generator, the training and the edits.
        say: a watcher, told of each stage.
        num_authors: number of invented authors, those to be forgotten included.
        facts_per_author: number of questions about each author.
        num_forgotten: number of authors to be forgotten, the last ones.
        model: size of the GPT.
        recipe: how the GPT is trained; the comparison is made at each of its numbers of epochs.
        grid: settings that the methods are tried at.

    Returns:
        One comparison for each number of epochs.
    """
    rows = generate_authors(seed, num_authors, facts_per_author)
    names = list(dict.fromkeys(row.fields["author"] for row in rows))
    gone = set(names[len(names) - num_forgotten :])
    forget = [row for row in rows if row.fields["author"] in gone]
    retain = [row for row in rows if row.fields["author"] not in gone]
    # Authors of whom nobody has heard, by another seed; one may be a namesake.
    others = generate_authors(seed + 1, 2 * num_forgotten, facts_per_author)
    strangers = [row for row in others if row.fields["author"] not in names]
    unseen = strangers[: len(forget)]
    note = (
        f"A small GPT learns {len(rows)} question-answer pairs about {num_authors} invented "
        f"authors and is then made to forget {num_forgotten} of them."
    )
    return question_answer(
        Selection(rows, forget, retain, unseen),
        Caption("authors", "Authors: forget some people", note),
        model=model,
        recipe=recipe,
        grid=grid,
        seed=seed,
        say=say,
    )
