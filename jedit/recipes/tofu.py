"""TOFU end to end: train, retrain, forget by every method, evaluate by the benchmark's definitions.

The real data set is read from a folder or by the `datasets` library.  A model learns some of its
fictitious authors, and the questions about real authors and the world, which stand in for what a
pretrained model knows; the retrained one learns the same without the authors to be forgotten.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jedit import metrics
from jedit.data import QaRow, read_tofu, text_of, train_tokenizer
from jedit.data.benchmarks import TOFU_AUTHORS
from jedit.models import gpt, gpt_stepper
from jedit.recipes.compare import Grid, Say, Task, compare, with_all_methods
from jedit.recipes.question_answer import REFUSAL, SELECT, Model
from jedit.recipes.tofu_attacks import attack
from jedit.recipes.tofu_evaluation import (
    LanguageModel,
    Questions,
    encode_questions,
    membership_aucs,
    score_set,
    truth_ratios,
)
from jedit.recipes.training import Recipe, train
from jedit.report import Comparison, Evaluation

ANSWER_TOKENS = 64  # positions beyond the longest row, for answers that go on
HELDOUT_AUTHORS = range(14, 20)  # of the 20 that have paraphrases and wrong answers

SHORT = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}


class Preset(NamedTuple):
    """How large a run is.

    Attributes:
        authors: how many the model learns, the forgotten ones included.
        forgotten: the last so many of TOFU's, at most 20.
        questions: of each set that judges the points, at most.
        model: the GPT's size.
        recipe: of the training.
        grid: what the methods are tried at: six evaluations each.
    """

    authors: int
    forgotten: int
    questions: int
    model: Model
    recipe: Recipe
    grid: Grid


RATES = (3e-4, 1e-3)
GRID = with_all_methods(
    Grid(
        budgets=(0.05, 0.2, 0.8),
        temperatures=(1.0, 4.0),
        damping=(0.1,),
        kfade_steps=(1,),
        learning_rates={
            "gradient ascent": (1e-4, 3e-4),
            "GradDiff": RATES,
            "NPO": RATES,
            "NPO (natural)": (1e-4, 1e-3),
        },
        looks=(8, 16, 32),
        batch_size=16,
        kl_budget=0.5,
        utility_share=0.8,
    ),
    RATES,
    (0.1, 0.2, 0.4, 0.7, 1.0, 1.5),
    "IdkDPO",
)
GRID = GRID._replace(
    scales={name: GRID.scales["engram"] for name in GRID.scales}
    | dict.fromkeys(("AlphaEdit", "MEMIT"), (0.1, 0.3, 1.0, 2.0, 3.0, 5.0)),
    learning_rates=GRID.learning_rates | dict.fromkeys(("GU (leaf)", "GU (global)"), (1e-4, 3e-4)),
)
PRESETS = {
    "cpu": Preset(
        authors=60,
        forgotten=6,
        questions=60,
        model=Model(width=160, layers=4, heads=4, vocab=2048, max_len=176),
        recipe=Recipe(epochs=(12,), batch_size=16, learning_rate=1e-3),
        grid=GRID,
    ),
    "gpu": Preset(
        authors=TOFU_AUTHORS,
        forgotten=20,
        questions=400,
        model=Model(width=768, layers=12, heads=12, vocab=8192, max_len=160),
        recipe=Recipe(epochs=(10,), batch_size=32, learning_rate=3e-4),
        grid=GRID,
    ),
}


class Sets(NamedTuple):
    """The rows of a run; `seen` are the retain rows that edits see, `heldout` the others."""

    forget: list[QaRow]
    seen: list[QaRow]
    heldout: list[QaRow]
    real_authors: list[QaRow]
    world_facts: list[QaRow]
    holdout: list[QaRow]

    @property
    def kept(self) -> list[QaRow]:
        """What the retrained model learns."""
        return [*self.seen, *self.heldout, *self.real_authors, *self.world_facts]


def read_sets(where: str | Path, preset: Preset) -> Sets:
    """Read what a preset needs.

    Raises:
        ValueError: more authors to forget than have paraphrases and wrong answers.
    """
    num_kept = preset.authors - preset.forgotten
    if not (0 < preset.forgotten <= 20 < num_kept and preset.authors <= TOFU_AUTHORS):
        raise ValueError(
            f"1 to 20 authors of at most {TOFU_AUTHORS} can be forgotten, and more than 20 have to "
            f"be kept; got {preset.forgotten} of {preset.authors}"
        )
    first = TOFU_AUTHORS - preset.forgotten
    kept = {f"author {i}" for i in range(preset.authors - preset.forgotten)}
    gone = {f"author {i}" for i in range(first, TOFU_AUTHORS)}
    away = {f"author {i}" for i in HELDOUT_AUTHORS}
    full = read_tofu(where, "full")
    with_wrong = {row.identity: row for row in read_tofu(where, "retain_perturbed")}
    return Sets(
        forget=[row for row in read_tofu(where, "forget10_perturbed") if row.author in gone],
        seen=[row for row in full if row.author in kept - away],
        heldout=[with_wrong[row.identity] for row in full if row.author in away],
        real_authors=read_tofu(where, "real_authors_perturbed"),
        world_facts=read_tofu(where, "world_facts_perturbed"),
        holdout=read_tofu(where, "holdout10")[: 20 * preset.forgotten],
    )


def tofu(
    sets: Sets, preset: Preset, *, seed: int, say: Say, with_attacks: bool = True
) -> tuple[Comparison, ...]:
    """Run the benchmark.

    Args:
        sets: of `read_sets`, for the same preset.
        preset: the size; see `PRESETS`.
        seed: of everything random.
        say: told of each stage.
        with_attacks: whether the best models are attacked as well.

    Returns:
        One comparison, its leaderboard filled.
    """
    init_key, order_key, compare_key, attack_key = (
        jax.random.fold_in(jax.random.key(seed), i) for i in range(4)
    )
    model, initial = _build(sets, preset.model, key=init_key)
    everything = [*sets.forget, *sets.kept]
    say(f"training a GPT on {len(everything)} rows")
    original = train(model.apply, initial, _rows(model, everything), preset.recipe, key=order_key)
    say(f"retraining without the {len(sets.forget)} rows to forget")
    retrained = train(model.apply, initial, _rows(model, sets.kept), preset.recipe, key=order_key)
    start = time.perf_counter()
    asked = {
        "forget": encode_questions(model, sets.forget),
        "retain": encode_questions(model, sets.heldout[: preset.questions]),
        "real_authors": encode_questions(model, sets.real_authors[: preset.questions]),
        "world_facts": encode_questions(model, sets.world_facts[: preset.questions]),
    }
    task = Task(
        apply=model.apply,
        original=original[-1].params,
        retrained=retrained[-1].params,
        forget=_rows(model, sets.forget),
        retain=_rows(model, sets.seen),
        heldout=_rows(model, sets.heldout),
        test=None,
        truth_ratio=lambda params: truth_ratios(model, params, asked["forget"]),
        select=SELECT,
        chunk=model.chunk,
        probe=64,
        hidden_site=f"blocks/{preset.model.layers - 1}/attn/query/kernel",
        layers=tuple(f"blocks/{i}/mlp/down/kernel" for i in range(preset.model.layers)),
        refusals=model.encode([(row.question, REFUSAL) for row in sets.forget]),
        utility=lambda params: _utility(model, params, asked),
        judged_rows=preset.questions,
    )
    judged, models = compare(task, preset.grid, key=compare_key, say=say)
    models = {"untouched": task.original, "retrained": task.retrained} | models
    whole = {
        name: encode_questions(model, rows)
        for name, rows in sets._asdict().items()
        if name in ("real_authors", "world_facts")
    }
    whole |= {"forget": asked["forget"], "retain": encode_questions(model, sets.heldout)}
    reference = truth_ratios(model, task.retrained, whole["forget"])
    evaluations, leaderboard = {}, {}
    for name, params in models.items():
        say(f"evaluating {name}")
        evaluations[name] = evaluate(model, params, whole, sets.holdout, reference)
        leaderboard[name] = {metric: found.aggregate for metric, found in evaluations[name].items()}
        if with_attacks:
            leaderboard[name] |= attack(model, params, task, whole, key=attack_key)
    baseline = leaderboard["retrained"]["mia_min_k"]
    for name, row in leaderboard.items():
        if baseline < 1:  # else the retrained model gives the forget rows away itself
            row["privleak"] = metrics.privleak(row["mia_min_k"], baseline)
            evaluations[name]["privleak"] = Evaluation(row["privleak"])
    size = sum(x.size for x in jax.tree.leaves(initial))
    return (
        Comparison(
            name="tofu",
            title=f"TOFU: forget {preset.forgotten} of {preset.authors} authors",
            notes=(
                f"The model learns {len(everything)} question-answer rows: {preset.authors} "
                "authors of TOFU, its real authors and its world facts. Curvature and edits see "
                f"{len(sets.seen)} retain rows; the {len(sets.heldout)} of authors 14 to 19, which "
                "they do not see, are the retain questions of Model Utility and of the KL. "
                f"{model.num_cut([*everything, *sets.holdout])} rows, right and wrong answers "
                f"counted, are longer than {preset.model.max_len} tokens and were cut off.",
            ),
            num_rows={name: len(rows) for name, rows in sets._asdict().items()},
            settings={
                "model": f"GPT, {preset.model}, {size} parameters",
                "training": str(preset.recipe),
                "questions of each set that judge a point": preset.questions,
                "seed": seed,
            },
            seconds={
                "train": original[-1].seconds,
                "retrain": retrained[-1].seconds,
                "fit, edit, judge and attack": time.perf_counter() - start,
            },
            kl_budget=preset.grid.kl_budget,
            utility_share=preset.grid.utility_share,
            original=judged.original,
            retrained=judged.retrained,
            methods=judged.methods,
            curves=judged.curves,
            leaderboard=leaderboard,
            evaluations=evaluations,
        ),
    )


def evaluate(
    model: LanguageModel,
    params: PyTree,
    asked: dict[str, Questions],
    holdout: Sequence[QaRow],
    reference: np.ndarray,
) -> dict[str, Evaluation]:
    """Every metric of one model, row by row, under the leading framework's names.

    Args:
        model: its functions.
        params: its parameters.
        asked: the question sets.
        holdout: rows like the forget ones that no model was trained on.
        reference: truth ratios of the forget questions under the retrained model.
    """
    scores = {name: score_set(model, params, questions) for name, questions in asked.items()}
    forget = scores["forget"]
    utilities = {name: found.utility for name, found in scores.items() if name != "forget"}
    found = {
        "forget_quality": Evaluation(metrics.forget_quality(forget.truth_ratio, reference)),
        "model_utility": Evaluation(metrics.model_utility(**utilities)),
        "forget_truth_ratio": Evaluation(
            metrics.forget_truth_ratio(forget.truth_ratio), {"score": forget.truth_ratio}
        ),
    }
    for name, short in SHORT.items():
        rows = scores[name]
        means = rows.utility
        found[f"{short}_Q_A_Prob"] = Evaluation(
            means.probability, {"prob": rows.probability, "avg_loss": rows.loss}
        )
        found[f"{short}_Q_A_ROUGE"] = Evaluation(
            means.rouge, {"rougeL_recall": rows.rouge, "generation": rows.generations}
        )
        if name != "forget":
            found[f"{short}_Truth_Ratio"] = Evaluation(
                means.truth_ratio, {"score": rows.truth_ratio}
            )
    for name, metric in (
        ("exact_memorization", metrics.exact_memorization),
        ("extraction_strength", metrics.extraction_strength),
    ):
        values = metric(model.apply, params, asked["forget"].answers)
        found[name] = Evaluation(float(np.mean(values)), {"score": values})
    for name, auc in membership_aucs(model, params, asked["forget"], holdout).items():
        found[f"mia_{name}"] = Evaluation(auc)
    return found


def _build(sets: Sets, size: Model, *, key) -> tuple[LanguageModel, PyTree]:
    tokenizer = train_tokenizer(text_of([*sets.forget, *sets.kept]), size.vocab)
    apply, params = gpt(
        key=key,
        vocab=tokenizer.get_vocab_size(),
        width=size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        max_len=size.max_len + ANSWER_TOKENS,
    )
    stepper = gpt_stepper(num_layers=size.layers, num_heads=size.heads)
    return LanguageModel(apply, stepper, tokenizer, size.max_len), params


def _rows(model: LanguageModel, rows: Sequence[QaRow]):
    return model.encode([(row.question, row.answer) for row in rows])


def _utility(model: LanguageModel, params: PyTree, asked: dict[str, Questions]) -> float:
    names = ("retain", "real_authors", "world_facts")
    utilities = (score_set(model, params, asked[name]).utility for name in names)
    return metrics.model_utility(*utilities)
