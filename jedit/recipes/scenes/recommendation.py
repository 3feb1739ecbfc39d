"""The recommendation scene: a small generative recommender forgets some users, or some choices.

A GPT reads the items that a user has had and predicts the next. Each user's last item is learnt by
no model: the ranking of it says what the recommendations are worth. It is asked for at a place in
the history where other users' items are learnt, in every model. What is forgotten are all that some
users chose, or the half of it that they withdraw.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jedit.core.batch import Batch
from jedit.data import DataError, Interactions, generate_interactions
from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import Need, Pace, Reach
from jedit.recipes.comparison.compare import compare
from jedit.recipes.comparison.task import ASIDE, SHARES, Grid, Task
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.progress import Say, Within
from jedit.recipes.scenes.question_answer import SELECT, SHARE_SEEN, Model
from jedit.recipes.scenes.ranking import TOP, ranking
from jedit.report import Comparison

Forgotten = Literal["users", "choices"]
MODEL = Model(width=64, layers=2, heads=4, vocab=0, max_len=50)
# After 10 epochs it knows its users' choices nearly by heart and recommends well; later ones cost
# the recommendations.
RECIPE = Recipe((10,), batch_size=32, learning_rate=2e-3)
RATES = (1e-4, 3e-4, 1e-3)
SLOW = dict.fromkeys((Pace.PLAIN_ASCENT, Pace.ADAM_METRIC), (3e-5, 1e-4, 3e-4))
OWN_UNITS = {Pace.PREDICTED_KL: (1e-4, 3e-4, 1e-3), Pace.STEP_LENGTH: (0.03, 0.1, 0.3)}
GRID = Grid(
    methods=("K-FADE (K-FAC)", "GradDiff", "NPO", "U-CAN", "CURE", "REGLU"),
    budgets=(0.01, 0.03, 0.07, 0.2),
    temperatures=(1.0,),
    damping=(0.1,),
    kfade_steps=(4,),
    rates=dict.fromkeys(Pace, RATES) | SLOW | OWN_UNITS,
    scales={Reach.WHOLE: (0.03, 0.1, 0.3, 1.0), Reach.FACTS: (0.3, 1.0, 3.0), Reach.SHARE: SHARES},
    looks=(2, 4, 8, 16, 32, 64),
    batch_size=16,
    kl_budget=0.1,
)
# For `jedit demo --methods all`: items have no refusals and no alternates, and answer nothing.
ALL = GRID._replace(
    methods=tuple(
        row.name
        for row in CATALOGUE.values()
        if row.name not in ASIDE and not row.needs & {Need.REFUSALS, Need.ALTERNATES, Need.DIALOGUE}
    )
)
SHARE_FORGOTTEN = 0.1
MIN_USERS = 20  # two of them to be forgotten, and retain users for the edit and for the judge
MAX_ITEMS = 50_000  # at which the logits of 64 rows of 50 items take 640 MB; arbitrary


class Sets(NamedTuple):
    """The rows of one comparison, a user each; items are numbered from 1, padding is 0.

    Attributes:
        data: what the model learns.
        kept: the same without what is to be forgotten.
        forget: what is to be forgotten.
        seen: what is kept of the users that edits see; of users who withdraw choices as well.
        heldout: of the other users to keep, likewise.
        forget_next: the last item of the users that something is forgotten of, which no model
            learns.
        retain_next: that of the users held out, whom no edit sees.
    """

    data: Batch
    kept: Batch
    forget: Batch
    seen: Batch
    heldout: Batch
    forget_next: Batch
    retain_next: Batch


def recommendation(
    *,
    seed: int,
    say: Say,
    interactions: Interactions | None = None,
    forgotten: Forgotten = "users",
    model: Model = MODEL,
    recipe: Recipe = RECIPE,
    grid: Grid = GRID,
) -> tuple[Comparison, ...]:
    """Train a recommender, retrain it without what is to be forgotten, edit and compare.

    Args:
        seed: seed of the interactions, of who is forgotten, of the training and of the edits.
        say: a watcher, told of each stage.
        interactions: what users chose; None: seeded ones are drawn.
        forgotten: "users" withdraw all that they chose, or half of it, "choices".
        model: size of the GPT; its vocabulary is the items.
        recipe: how the GPT is trained.
        grid: settings that the methods are tried at.

    Returns:
        One comparison, with the rankings of each method's best point as its leaderboard.

    Raises:
        DataError: interactions of too few users or items.
    """
    log = generate_interactions(seed) if interactions is None else interactions
    sets = split(log, forgotten, seed=seed, max_len=model.max_len)
    apply, original, retrained = trained(sets, len(log.items), model, recipe, seed=seed, say=say)
    start = time.perf_counter()
    task = task_of(sets, apply, original.params, retrained.params, model)
    key = jax.random.fold_in(jax.random.key(seed), 2)
    judged, models = compare(task, grid, key=key, say=Within("recommendation", say))
    say("recommendation: ranking")
    shown = {"untouched": original.params, "retrained": retrained.params, **models}
    what = "all that they chose" if forgotten == "users" else "half of what they chose"
    counts = {name: len(rows.inputs) for name, rows in sets._asdict().items()}
    comparison = Comparison(
        name="recommendation",
        title=f"Recommendation: forget some {forgotten}",
        notes=(
            f"A small GPT learns in which order {len(log.users)} users chose among "
            f"{len(log.items)} items, and is then made to forget {what} of {counts['forget']} of "
            "them. The retrained model comes from the same recipe and the same initial parameters "
            "without it. Users to keep are cut in two: curvature and edits see the first part, the "
            "held-out part judges them. The last item of each user is learnt by no model: those "
            "of held-out users are the test rows, and rankings of them say what the "
            "recommendations are worth.",
        ),
        num_rows={
            "training": counts["data"],
            "forget": counts["forget"],
            "retain, seen by edits": counts["seen"],
            "retain, held out from edits": counts["heldout"],
        },
        num_judged=judged.num_judged,
        settings={
            "model": f"GPT, {model.layers} blocks of width {model.width}, {model.heads} heads, "
            f"{sum(x.size for x in jax.tree.leaves(original.params))} parameters",
            "training": str(recipe),
            "K-FADE edits": f"parameters that match {SELECT}",
            "rows of the line search": min(task.probe, counts["seen"]),
            "seed": seed,
        },
        seconds={
            "train": original.seconds,
            "retrain": retrained.seconds,
            "fit, edit and judge": time.perf_counter() - start,
        },
        kl_budget=grid.kl_budget,
        original=judged.original,
        retrained=judged.retrained,
        methods=judged.methods,
        curves=judged.curves,
        leaderboard={name: rankings(apply, params, sets) for name, params in shown.items()},
    )
    return (comparison,)


def check_size(log: Interactions) -> None:
    """Refuse interactions of too few users or items, or of too many items.

    Raises:
        DataError: with what there is.
    """
    if len(log.items) > MAX_ITEMS:
        raise DataError(
            f"a recommender scores all items at every place, {MAX_ITEMS} of them at most, got "
            f"{len(log.items)} items; leave the rarest out."
        )
    if len(log.users) < MIN_USERS or len(log.items) <= TOP:
        raise DataError(
            f"a recommender needs {MIN_USERS} users with three items each and more than {TOP} "
            f"items, got {len(log.users)} users and {len(log.items)} items."
        )


def split(log: Interactions, forgotten: Forgotten, *, seed: int, max_len: int) -> Sets:
    """Choose who is forgotten, and make the rows of both kinds; longer histories lose their start.

    No history is longer than the longest of the users whose choices are all kept, and the rows of
    last items begin one item later, so that whatever is asked for stands at a place where every
    model has learnt.

    Raises:
        DataError: interactions of too few users or items.
    """
    check_size(log)
    rng = np.random.default_rng([seed, 1])
    users = rng.permutation(len(log.users))
    gone, rest = np.split(users, [max(2, round(SHARE_FORGOTTEN * len(users)))])
    seen, heldout = _cut(rest)
    # What the model reads, one item to predict behind it, and the last one, which is not learnt.
    longest = min(max_len + 2, max(len(log.sequences[i]) for i in rest))
    known = [items[-longest:] + 1 for items in log.sequences]
    width = longest - 2
    learnt = [items[:-1] for items in known]
    kept = dict(enumerate(learnt))
    is_gone = [np.ones(len(items), bool) for items in learnt]
    for user in gone:
        if forgotten == "users":
            del kept[user]
            continue
        # Half of what can be predicted: the first item of a history cannot.
        places = rng.permutation(np.arange(1, len(learnt[user])))
        is_gone[user][:] = False
        is_gone[user][places[: max(1, len(places) // 2)]] = True
        kept[user] = learnt[user][~is_gone[user]]
    if forgotten == "choices":
        seen, heldout = (np.concatenate(x) for x in zip((seen, heldout), _cut(gone), strict=True))

    def rows(sequences: Sequence[np.ndarray], asked: Sequence[np.ndarray] | None = None) -> Batch:
        inputs = np.zeros((len(sequences), width), np.int32)
        targets, mask, valid = (np.zeros_like(inputs) for _ in range(3))
        for i, items in enumerate(sequences):
            end = len(items) - 1
            inputs[i, :end], targets[i, :end], valid[i, :end] = items[:-1], items[1:], 1
            mask[i, :end] = 1 if asked is None else asked[i][1:]
        return Batch(*(jax.numpy.asarray(x) for x in (inputs, targets, mask, valid)))

    def of_next(chosen: np.ndarray) -> Batch:
        sequences = [known[i][-width - 1 :] for i in chosen]
        return rows(sequences, [np.arange(len(one)) == len(one) - 1 for one in sequences])

    def of_kept(chosen: np.ndarray) -> Batch:
        return rows([kept[i] for i in chosen if i in kept and len(kept[i]) > 1])

    return Sets(
        data=rows(learnt),
        kept=of_kept(np.arange(len(learnt))),
        forget=rows([learnt[i] for i in gone], [is_gone[i] for i in gone]),
        seen=of_kept(seen),
        heldout=of_kept(heldout),
        forget_next=of_next(gone),
        retain_next=of_next(np.setdiff1d(heldout, gone)),
    )


def _cut(users: np.ndarray) -> list[np.ndarray]:
    return np.split(users, [round(SHARE_SEEN * len(users))])


def trained(
    sets: Sets, num_items: int, model: Model, recipe: Recipe, *, seed: int, say: Say
) -> tuple[Callable, PyTree, PyTree]:
    """Return the recommender, trained on everything and without what is to be forgotten.

    Both come from one start and by the same recipe.
    """
    init_key, order_key = (jax.random.fold_in(jax.random.key(seed), i) for i in range(2))
    apply, initial = model.make(num_items + 1, sets.data.inputs.shape[1], key=init_key)
    say(f"recommendation: training a GPT on the choices of {len(sets.data.inputs)} users")
    original = train(apply, initial, sets.data, recipe, key=order_key, say=say)[-1]
    say("recommendation: retraining without what is to be forgotten")
    retrained = train(apply, initial, sets.kept, recipe, key=order_key, say=say)[-1]
    return apply, original, retrained


def task_of(sets: Sets, apply: Callable, original: PyTree, retrained: PyTree, model: Model) -> Task:
    """Return what a comparison is given."""
    return Task(
        apply=apply,
        original=original,
        retrained=retrained,
        forget=sets.forget,
        retain=sets.seen,
        heldout=sets.heldout,
        test=sets.retain_next,
        truth_ratio=None,
        select=SELECT,
        chunk=64,
        probe=64,
        hidden_site=f"blocks/{model.layers - 1}/attn/query/kernel",
        layers=tuple(f"blocks/{i}/mlp/down/kernel" for i in range(model.layers)),
    )


def rankings(apply: Callable, params: PyTree, sets: Sets) -> dict[str, float]:
    """Rank what is to be forgotten, and the next items, which no model has learnt."""
    found = {}
    for name, rows in (
        ("forget", sets.forget),
        ("forget_next", sets.forget_next),
        ("retain_next", sets.retain_next),
    ):
        for metric, value in ranking(apply, params, rows).items():
            found[f"{name}_{metric}"] = value
    return found
