"""TOFU end to end: train, retrain, forget by every method, evaluate by the benchmark's definitions.

The real data set is read from a folder or by the `datasets` library; without it, invented authors
stand in.  A model learns some of its fictitious authors, and the questions about real authors and
the world, which stand in for what a pretrained model knows; the retrained one learns the same
without the authors to be forgotten.  A pretrained model from a folder learns the authors alone, or
has learned them.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jedit import metrics
from jedit.data import QaRow, generate_authors, pack, read_tofu, rows_with
from jedit.data.benchmarks import TOFU_AUTHORS
from jedit.edits import cast_report, edit_between
from jedit.models import cast_params
from jedit.recipes.comparison.compare import compare
from jedit.recipes.comparison.task import Task
from jedit.recipes.factorizing import told
from jedit.recipes.fitting import Trained, train
from jedit.recipes.progress import Say, tell
from jedit.recipes.scenes.question_answer import REFUSAL, Model
from jedit.recipes.tofu.attacks import attack
from jedit.recipes.tofu.depth import Three, depth_of
from jedit.recipes.tofu.evaluation import (
    LanguageModel,
    Questions,
    alternates,
    dialogue_of,
    encode_questions,
    score_set,
    truth_ratios,
)
from jedit.recipes.tofu.log import (
    SHORT,
    against,
    aggregates,
    attack_log,
    model_utility,
    set_log,
)
from jedit.recipes.tofu.membership import (
    Answers,
    Reference,
    encode_answers,
    membership_aucs,
    membership_scores,
    reference_of,
)
from jedit.recipes.tofu.models import Start, small_gpt
from jedit.recipes.tofu.presets import Preset
from jedit.report import Answer, Comparison, Evaluation
from jedit.requests.unseen import spread

SHOWN = 3  # of the forget and of the held-out rows, with their answers
HELDOUT_AUTHORS = range(14, 20)  # of the 20 that have paraphrases and wrong answers


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
        """Return the rows of the fictitious authors that stay."""
        return [*self.seen, *self.heldout]

    @property
    def general(self) -> list[QaRow]:
        """Return what a pretrained model knows, and one that begins with nothing has to learn."""
        return [*self.real_authors, *self.world_facts]


def read_sets(where: str | Path, preset: Preset) -> Sets:
    """Read the sets of TOFU that a preset needs.

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
        forget=rows_with(read_tofu(where, "forget10_perturbed"), "author", sorted(gone)),
        seen=rows_with(full, "author", sorted(kept - away)),
        heldout=[with_wrong[row.identity] for row in rows_with(full, "author", sorted(away))],
        real_authors=read_tofu(where, "real_authors_perturbed"),
        world_facts=read_tofu(where, "world_facts_perturbed"),
        holdout=read_tofu(where, "holdout10")[: 20 * preset.forgotten],
    )


def invented_sets(preset: Preset, *, seed: int, facts_per_author: int = 10) -> Sets:
    """Make the sets that a preset needs out of `generate_authors`, where TOFU is not at hand.

    For the real authors and the world facts, which are asked by choice among the right and the
    wrong answers, stand two further groups of invented ones that the model learns as well; the
    holdout are authors that no model sees. A fifth of the authors to be kept is held out.

    Raises:
        ValueError: not enough authors are kept.
    """
    num_kept = preset.authors - preset.forgotten
    if preset.forgotten < 1 or num_kept < 5:
        raise ValueError(
            "at least 1 author has to be forgotten and 5 have to be kept; got "
            f"{preset.forgotten} of {preset.authors}"
        )
    away = num_kept // 5
    sizes = (preset.forgotten, num_kept - away, away, away, away, preset.forgotten)
    rows = generate_authors(seed, sum(sizes), facts_per_author)
    ends = facts_per_author * np.cumsum((0, *sizes))
    sets = Sets(*(rows[i:j] for i, j in itertools.pairwise(ends)))
    return sets._replace(
        real_authors=[row._replace(paraphrased_answer=None) for row in sets.real_authors],
        world_facts=[row._replace(paraphrased_answer=None) for row in sets.world_facts],
    )


class Scene(NamedTuple):
    """Two trained models, the original and the retrained, with the questions that they are asked.

    Attributes:
        model: the functions of both models.
        task: the comparison's task.
        asked: the question sets that judge a point.
        description: a sentence that says what the model is.
        training: by model's name, the trained model and its seconds; empty if both were given.
        with_general: whether rows of real authors and world facts were among the training rows.
        stream: by depth, the sites that write into the residual stream, if they are known.
    """

    model: LanguageModel
    task: Task
    asked: dict[str, Questions]
    description: str
    training: dict[str, Trained]
    with_general: bool
    stream: tuple[tuple[str, ...], ...]


def prepare(
    sets: Sets, preset: Preset, *, seed: int, say: Say, begin: Start | None = None
) -> Scene:
    """Train the models, or take those that are given, from the arguments of `tofu`.

    Raises:
        ValueError: neither a pretrained model nor the size of a GPT.
    """
    # 2 is `compare_key`'s, 3 the attacks'.
    keys = (jax.random.fold_in(jax.random.key(seed), i) for i in (0, 1, 4))
    init_key, order_key, sample_key = keys
    general = []
    if begin is None:
        if not isinstance(preset.model, Model):
            raise ValueError("this preset is for a pretrained model, which begin= has to bring")
        general = sets.general
        rows = [*sets.forget, *sets.kept, *general]
        begin = small_gpt(rows, preset.model, preset.dtype, key=init_key)
    model, everything = begin.model, [*sets.forget, *sets.kept, *general]
    original, retrained, training = begin.params, begin.retrained, {}
    if retrained is None:
        for name, rows in (("train", everything), ("retrain", [*sets.kept, *general])):
            without = f" without the {len(sets.forget)} to forget" if name == "retrain" else ""
            say(f"{name}ing on {len(rows)} rows{without}")
            sequences = pack(_rows(model, rows), model.max_len).batch
            training[name] = train(
                model.apply, begin.params, sequences, preset.recipe, key=order_key, say=say
            )[-1]
        original, retrained = (training[name].params for name in ("train", "retrain"))
    asked = {
        "forget": encode_questions(model, sets.forget),
        "retain": encode_questions(model, sets.heldout[: preset.questions]),
        "real_authors": encode_questions(model, sets.real_authors[: preset.questions]),
        "world_facts": encode_questions(model, sets.world_facts[: preset.questions]),
    }
    seen = sets.kept if preset.protocol == "field" else sets.seen
    task = Task(
        apply=model.apply,
        original=original,
        retrained=retrained,
        forget=_rows(model, sets.forget),
        retain=_rows(model, seen),
        heldout=_rows(model, sets.heldout),
        test=None,
        truth_ratio=lambda params: truth_ratios(model, params, asked["forget"]),
        select=begin.select,
        chunk=model.chunk,
        probe=32,
        hidden_site=begin.hidden_site,
        layers=begin.layers,
        refusals=model.encode([(row.question, REFUSAL) for row in sets.forget]),
        alternates=lambda: alternates(model, original, asked["forget"], key=sample_key),
        dialogue=lambda: dialogue_of(model, sets.forget, seen, preset.grid.rates),
        utility=lambda params: _utility(model, params, asked),
        judged_rows=preset.questions,
        pack=lambda rows: pack(rows, model.max_len).batch,
    )
    return Scene(model, task, asked, begin.description, training, bool(general), begin.stream)


def compare_key(seed: int) -> Array:
    """Derive the key of a run's curvature and batches from its seed."""
    return jax.random.fold_in(jax.random.key(seed), 2)


def tofu(
    sets: Sets,
    preset: Preset,
    *,
    seed: int,
    say: Say,
    with_attacks: bool = True,
    begin: Start | None = None,
    found_model: Callable[[str, PyTree], None] | None = None,
) -> tuple[Comparison, ...]:
    """Run the TOFU benchmark end to end.

    Args:
        sets: the rows of `read_sets` or `invented_sets`, for the same preset.
        preset: size of the run, one of `PRESETS`.
        seed: seed of everything random.
        say: a watcher, told of each stage.
        with_attacks: whether the best models are attacked as well.
        begin: a pretrained model; None: a GPT of the preset's size is made and trained.
        found_model: a function that is given the name and the params of each best model, if any are
            to be saved.

    Returns:
        One comparison, its leaderboard filled.

    Raises:
        ValueError: neither a pretrained model nor the size of a GPT.
    """
    scene = prepare(sets, preset, seed=seed, say=say, begin=begin)
    model, task, training = scene.model, scene.task, scene.training
    start = time.perf_counter()
    # A model for each method is more than a device may hold.
    judged, kept = compare(task, preset.grid, key=compare_key(seed), say=say, hold=jax.device_get)
    models = {"untouched": task.original, "retrained": task.retrained} | kept
    whole = asked_whole(scene, sets)
    unseen = encode_answers(model, sets.holdout)
    reference = reference_of(model, task.retrained, whole["forget"], unseen)
    known = Answers(sets.forget, whole["forget"].answers)
    three = Three(task.original, task.original, task.retrained)
    attack_key = jax.random.fold_in(jax.random.key(seed), 3)
    evaluations, leaderboard = {}, {}
    say(f"evaluating {len(models)} models{' under attack' if with_attacks else ''}")
    for i, name in enumerate(models):
        tell(say, i, len(models))
        params = models[name]
        if name in kept:
            params = jax.tree.map(_put_like, params, task.original)
        if found_model is not None:
            found_model(name, params)
        leaderboard[name], evaluations[name] = evaluate(model, params, whole, unseen, reference)
        if scene.stream:
            depth = depth_of(model, three._replace(edited=params), known, scene.stream)
            evaluations[name]["jedit_depth_score"] = depth
            if depth.aggregate is not None:
                leaderboard[name]["depth_score"] = depth.aggregate
        if with_attacks:
            rate = preset.relearning_rate
            leaderboard[name] |= attack(model, params, task, whole, key=attack_key, rate=rate)
        if name in kept and np.dtype(model.dtype).itemsize < 4:
            leaderboard[name]["rounded_away"] = _rounded_away(model, task.original, params)
    # After all models: what compares needs the retrained model's row whole.
    baseline = leaderboard["retrained"]["mia_min_k"]
    for name, row in leaderboard.items():
        if baseline < 1:  # else the retrained model gives the forget rows away itself
            row["privleak"] = metrics.privleak(row["mia_min_k"], baseline)
            evaluations[name]["jedit_privleak"] = Evaluation(row["privleak"])
        evaluations[name] |= against(evaluations[name], evaluations["retrained"])
        found = aggregates(row, leaderboard["untouched"], leaderboard["retrained"])
        row |= found
        evaluations[name] |= {f"jedit_{kind}": Evaluation(x) for kind, x in found.items()}
    trained_how = "none: both models were given"
    if training:
        trained_how = f"{preset.recipe}, of {model.max_len} tokens, filled with questions"
    return (
        Comparison(
            name="tofu",
            title=f"TOFU: forget {preset.forgotten} of {preset.authors} authors",
            notes=_notes(scene, sets, preset),
            num_rows={name: len(rows) for name, rows in sets._asdict().items()},
            num_judged=judged.num_judged,
            settings={
                "model": scene.description,
                "computed in": preset.dtype,
                "training": trained_how,
                "questions of each set that judge a point": preset.questions,
                "curvatures": told(preset.grid.factorize),
                "seed": seed,
            },
            seconds={
                **{name: trained.seconds for name, trained in training.items()},
                "fit, edit, judge and attack": time.perf_counter() - start,
            },
            kl_budget=preset.grid.kl_budget,
            utility_share=preset.grid.utility_share,
            original=judged.original,
            retrained=judged.retrained,
            methods=judged.methods,
            curves=judged.curves,
            answers=_answers(sets, evaluations, judged.chosen or "untouched"),
            leaderboard=leaderboard,
            evaluations=evaluations,
        ),
    )


def asked_whole(scene: Scene, sets: Sets) -> dict[str, Questions]:
    """Encode all questions, of which those that judge a point are a part."""
    model = scene.model
    return {
        "forget": scene.asked["forget"],
        "retain": encode_questions(model, sets.heldout),
        "real_authors": encode_questions(model, sets.real_authors),
        "world_facts": encode_questions(model, sets.world_facts),
    }


def _answers(
    sets: Sets, evaluations: dict[str, dict[str, Evaluation]], edited: str
) -> tuple[Answer, ...]:
    """Return what three models generated when they were evaluated, for a few rows of two sets."""
    found = []
    for kind, rows in (("forget", sets.forget), ("retain", sets.heldout)):
        said = [
            evaluations[name][f"{SHORT[kind]}_Q_A_ROUGE"].rows["generation"]
            for name in ("untouched", edited, "retrained")
        ]
        for i in spread(len(rows), SHOWN):
            found.append(
                Answer(kind, rows[i].question, rows[i].answer, *(texts[i] for texts in said))
            )
    return tuple(found)


def _notes(scene: Scene, sets: Sets, preset: Preset) -> tuple[str, ...]:
    what = f"{preset.authors} authors"
    learnt = [*sets.forget, *sets.kept]
    if scene.with_general:
        what += ", and TOFU's real authors and world facts, or what stands for them"
        learnt += sets.general
    notes = (
        f"The model learns {len(learnt)} question-answer rows: {what}. "
        f"{seen_by_methods(sets, preset)} "
        f"{scene.model.num_cut([*learnt, *sets.holdout])} rows, right and wrong answers "
        f"counted, are longer than {scene.model.max_len} tokens and were cut off.",
        "Every method is tried at as many points, settings times strengths, and its best "
        "one is chosen by looking at the retrained model, as a user without one cannot.",
    )
    if (kl := preset.grid.lost_kl) == math.inf:
        return notes
    lost = f"Beyond a held-out KL of {kl:g} nats an edited model's utility is not measured."
    return (*notes, lost)


def seen_by_methods(sets: Sets, preset: Preset) -> str:
    """Say which retain rows methods see, and which judge them."""
    names = {str(row.fields.get("author")) for row in sets.heldout}
    is_invented = not any(name.startswith("author ") for name in names)
    of = f"{len(names)} invented authors" if is_invented else "six authors (TOFU's 14 to 19)"
    held = f"the {len(sets.heldout)} of {of}"
    asked = "are the retain questions of Model Utility and of the KL."
    if preset.protocol == "field":
        return (
            f"The field's protocol: curvature and edits see all {len(sets.kept)} retain rows; "
            f"{held}, which {asked}"
        )
    return f"Curvature and edits see {len(sets.seen)} retain rows; {held}, not seen, {asked}"


def evaluate(
    model: LanguageModel,
    params: PyTree,
    asked: dict[str, Questions],
    unseen: Answers,
    reference: Reference,
) -> tuple[dict[str, float], dict[str, Evaluation]]:
    """Measure every metric of one model.

    Args:
        model: the language model's functions.
        params: the parameters of the model that is evaluated.
        asked: the encoded sets of questions.
        unseen: rows like the forget ones that no model was trained on.
        reference: the retrained model's losses and truth ratios on the forget and the unseen rows.

    Returns:
        jedit's metrics, and the log, row by row, of open-unlearning's and of jedit's.
    """
    scores = {name: score_set(model, params, questions) for name, questions in asked.items()}
    forget = scores["forget"]
    utilities = {name: found.utility for name, found in scores.items() if name != "forget"}
    ours = {
        "forget_quality": metrics.forget_quality(forget.truth_ratio, reference.truth_ratio),
        "model_utility": metrics.model_utility(**utilities),
        "forget_truth_ratio": metrics.forget_truth_ratio(forget.truth_ratio),
    }
    log = {f"jedit_{name}": Evaluation(ours[name]) for name in ("forget_quality", "model_utility")}
    for name, found in scores.items():
        short, means = SHORT[name], found.utility
        is_choice = asked[name].paraphrases is None
        ours[f"{short}_Q_A_Prob" + "_normalised" * is_choice] = means.probability
        ours[f"{short}_Q_A_ROUGE"] = means.rouge
        if name != "forget":
            ours[f"{short}_Truth_Ratio"] = means.truth_ratio
        log |= set_log(name, model.words, asked[name], found)
    known = Answers(asked["forget"].rows, asked["forget"].answers)
    attacks = membership_scores(model, params, known, unseen, reference)
    log |= attack_log(model, params, (known, unseen), attacks)
    log["model_utility"] = model_utility(log)
    for name in ("exact_memorization", "extraction_strength"):
        ours[name] = log[f"jedit_{name}"].aggregate or 0.0
    paraphrased = metrics.answer_probability(forget.paraphrased_loss)
    ours["memorization_score"] = metrics.memorization_score(
        ours["extraction_strength"],
        ours["exact_memorization"],
        float(np.nan_to_num(paraphrased).mean()),
        forget.truth_ratio,
    )
    log["jedit_memorization_score"] = Evaluation(ours["memorization_score"])
    ours |= {f"mia_{name}": auc for name, auc in membership_aucs(*attacks).items()}
    return ours, log


def _rows(model: LanguageModel, rows: Sequence[QaRow]):
    return model.encode([(row.question, row.answer) for row in rows])


def _put_like(leaf: np.ndarray, other: jax.Array) -> jax.Array:
    """Put an array onto another's device, bound to it only if the other is.

    Where the two differ in that, all programs are compiled once more.

    Where the two differ in that, all programs are compiled once more.
    """
    return jax.device_put(leaf, other.sharding if other.committed else None)


def _rounded_away(model: LanguageModel, original: PyTree, params: PyTree) -> float:
    """Return the share of an edit that the computation's dtype rounds away, where it is largest."""
    edit = edit_between(original, params)
    report = cast_report(cast_params(original, model.dtype), edit)
    return max(float(loss.rounded_away) for loss in report.values())


def _utility(model: LanguageModel, params: PyTree, asked: dict[str, Questions]) -> float:
    names = ("retain", "real_authors", "world_facts")
    utilities = (score_set(model, params, asked[name]).utility for name in names)
    return metrics.model_utility(*utilities)
