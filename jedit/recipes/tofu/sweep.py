"""TOFU by several seeds, run by run: on a preset's grid or the published ones, by both protocols.

The two models are made once: where no retrained one is given, the folder's model learns the rows,
and a second time without those to forget, into OUT/models.  Every run, a method at one point by one
seed, is evaluated in full.  A method's best point is chosen on the first seed, by the rule of the
comparison, and reported on the others.  No run is trained again by an attack.
"""

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtyping import PyTree

from jedit import metrics
from jedit.data import batches
from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import ByDraws, ByScale, BySteps, Need, Row
from jedit.models import cast_params, save_model
from jedit.recipes.comparison.task import Grid
from jedit.recipes.editing import BATCH, BUDGET, DRAWS, RATE, RATES, SCALE, STEPS, Editor
from jedit.recipes.factorizing import factorize_for, written
from jedit.recipes.progress import Say
from jedit.recipes.sweep import (
    MODELS,
    REFERENCES,
    RETRAINED,
    UNTOUCHED,
    Found,
    Measured,
    Record,
    Sheet,
    Trial,
    finish,
    folder_hash,
    hash_of,
    mean_over,
    sweep,
)
from jedit.recipes.tofu.log import Log, aggregates
from jedit.recipes.tofu.membership import encode_answers, reference_of
from jedit.recipes.tofu.models import Pretrained, Start, from_folders
from jedit.recipes.tofu.presets import Preset
from jedit.recipes.tofu.published import published_method, published_points
from jedit.recipes.tofu.run import (
    Scene,
    Sets,
    asked_whole,
    evaluate,
    prepare,
    seen_by_methods,
)
from jedit.report.results import PASSING_QUALITY

Points = Literal["preset", "published"]
COLUMNS = {
    "quality": "forget_quality",
    "utility": "model_utility",
    "truth ratio": "forget_truth_ratio",
    "forget prob.": "forget_Q_A_Prob",
    "forget ROUGE": "forget_Q_A_ROUGE",
    "retain ROUGE": "retain_Q_A_ROUGE",
    "extraction": "extraction_strength",
    "privleak": "privleak",
    "overall": "overall_score",
    "KL": "heldout_kl",
}


class Folders(NamedTuple):
    """The folders of a sweep's models.

    Attributes:
        model: a pretrained model; with `retrained` it has learned all rows.
        retrained: the same model without the rows to forget; None: both are still to be made.
        tokenizer: folder of the tokenizer; None: the model's.
    """

    model: Path
    retrained: Path | None = None
    tokenizer: Path | None = None


def both_models(
    folders: Folders, sets: Sets, preset: Preset, out: Path, *, seed: int, say: Say
) -> tuple[Start, Folders]:
    """Load the model that knows the rows and the one that does not, or make them first.

    What is returned beside them are the folders that they were loaded from.

    Args:
        folders: the folders.
        sets: the rows.
        preset: how the models are trained, and run.
        out: folder of the sweep; what is trained goes into its models.
        seed: seed of the order of the rows.
        say: a watcher, told of each stage.

    Raises:
        ValueError: something cannot be loaded, or `out` has models of something else.
    """
    assert isinstance(preset.model, Pretrained)
    model, retrained, tokenizer = folders
    if retrained is None:
        about = {
            "model": folder_hash(model),
            "tokenizer": None if tokenizer is None else folder_hash(tokenizer),
            "recipe": str(preset.recipe),
            "data": data_hash(sets),
            "dtype": preset.dtype,
            "seed": seed,
        }
        made = out / MODELS
        if not made.exists():
            _train(folders, sets, preset, made, about, seed=seed, say=say)
        try:
            is_same = json.loads((made / "about.json").read_text()) == about
        except (OSError, ValueError):
            is_same = False
        if not is_same:
            raise ValueError(
                f"{made}: holds models that were trained otherwise; give another --out, or remove "
                "it"
            )
        folders = Folders(made / "full", made / RETRAINED, tokenizer or model)
    return from_folders(*folders, preset.model, preset.dtype), folders


def _train(
    folders: Folders,
    sets: Sets,
    preset: Preset,
    made: Path,
    about: Mapping[str, Any],
    *,
    seed: int,
    say: Say,
) -> None:
    """Train both models, and put them into their folder when they are whole."""
    assert isinstance(preset.model, Pretrained)
    begin = from_folders(folders.model, None, folders.tokenizer, preset.model, preset.dtype)
    scene = prepare(sets, preset, seed=seed, say=say, begin=begin)
    made.parent.mkdir(parents=True, exist_ok=True)
    for stale in made.parent.glob(f".{made.name}.*"):  # of a run that was killed as it saved
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=f".{made.name}.", dir=made.parent) as folder:
        new = Path(folder) / made.name
        new.mkdir()
        for name, params in (("full", scene.task.original), (RETRAINED, scene.task.retrained)):
            save_model(cast_params(params, preset.dtype), new / name, source=folders.model)
        (new / "about.json").write_text(json.dumps(about) + "\n")
        new.rename(made)


def data_hash(sets: Sets) -> str:
    """Return a hash of all rows, with their paraphrases and wrong answers."""
    others = ("paraphrased_answer", "perturbed_answer")
    return hash_of(
        [
            [(row.question, row.answer, [row.fields.get(name) for name in others]) for row in part]
            for part in sets
        ]
    )


def grid_points(row: Row, grid: Grid) -> list[dict[str, int | float]]:
    """Return the points of a preset's grid for one method, with the method's own settings.

    Temperatures are no axis of it: all methods step at the one that the model's outputs choose.
    """
    own = {k: v for k, v in row.settings.items() if isinstance(v, int | float)}
    if isinstance(row, BySteps):
        rate = RATES.get(row.pace, RATE)
        return [
            {**own, STEPS: steps, BATCH: grid.batch_size, rate: value}
            for value, steps in itertools.product(grid.rates[row.pace], grid.looks)
        ]
    if isinstance(row, ByDraws):
        return [{**own, DRAWS: draws} for draws in grid.draws]
    if isinstance(row, ByScale):
        return [{**own, SCALE: scale} for scale in grid.scales[row.reach]]
    varied = {"damping": grid.damping, "steps": grid.kfade_steps}
    varied = {name: values for name, values in varied.items() if name in row.settings}
    varied |= {BUDGET: grid.budgets}
    points = itertools.product(*varied.values())
    return [{**own, **dict(zip(varied, values, strict=True))} for values in points]


def tofu_sweep(
    sets: Sets,
    preset: Preset,
    begin: Start,
    seeds: Sequence[int],
    out: Path,
    about: Mapping[str, Any],
    *,
    points: Points,
    say: Say,
) -> list[tuple[str, list[list[str]]]]:
    """Run TOFU at every point by every seed, and return the tables, which `out` holds too.

    Args:
        sets: the rows.
        preset: size of the run, with its protocol; of its grid the methods, and the points unless
            published ones are asked for.
        begin: both models.
        seeds: seeds of the curvature's labels and of the batches; the models are the same for all.
        out: folder of the records and of the tables.
        about: hashes of the models; what else the runs are made of is added.
        points: the preset's grid, or the published ones.
        say: a watcher, told of each run.

    Raises:
        ValueError: a method without a published grid, or that takes what factors are not to hold,
            or records of another sweep in `out`.
    """
    names = preset.grid.methods
    rows = {name: CATALOGUE[name] for name in names}
    of = {
        name: published_points(name, len(sets.forget))
        if points == "published"
        else grid_points(rows[name], preset.grid)
        for name in names
    }
    how = factorize_for(list(rows.values()), preset.grid.factorize)
    scene = prepare(sets, preset, seed=seeds[0], say=say, begin=begin)
    task = scene.task
    asked = {"temperatures": preset.grid.temperatures, "factorize": how}
    editor = Editor(task, frozenset(Need), say=say, **asked)

    def edit(trial: Trial) -> PyTree:
        if trial.method in REFERENCES:
            return task.original if trial.method == UNTOUCHED else task.retrained
        name = trial.method
        make = None
        if points == "published":
            make = lambda material, point: published_method(name, material, point)  # noqa: E731
        return editor(rows[name], trial.point, trial.seed, make)

    about = {
        "benchmark": "TOFU",
        "protocol": preset.protocol,
        "points": points,
        "data": data_hash(sets),
        "forgotten": preset.forgotten,
        "dtype": preset.dtype,
        "max_len": scene.model.max_len,
        "factorize": written(how),
        **about,
    }
    trials = [Trial(name, {}, seeds[0]) for name in REFERENCES]
    trials += [Trial(name, point, seed) for seed in seeds for name in names for point in of[name]]
    records = sweep(trials, out, about, edit=edit, evaluate=_judge(scene, sets), say=say)
    records = compared(records)
    share = preset.grid.utility_share or 0.0
    best = best_records(records, share)
    later = " of the other seeds" if len(seeds) > 1 else ", as there is no other seed"
    notes = [
        seen_by_methods(sets, preset),
        "Chosen is each method's point of the greatest utility above Forget Quality "
        f"{PASSING_QUALITY:g}, of those that keep {share:.0%} of the untouched model's (else the "
        f"one of the greatest quality), by the first seed; its numbers are those{later}.",
        "No model was attacked by training it again, by quantisation or by other words.",
    ]
    sheets = [Sheet("Forget Quality, Model Utility and others", COLUMNS)]
    return finish(out, f"TOFU, {preset.protocol} protocol", about, records, sheets, notes, best)


def _judge(scene: Scene, sets: Sets) -> Callable[[PyTree], Found]:
    """Return the function that evaluates a model in full, but for attacks that train it again."""
    model, task = scene.model, scene.task
    whole = asked_whole(scene, sets)
    unseen = encode_answers(model, sets.holdout)
    reference = reference_of(model, task.retrained, whole["forget"], unseen)
    assert task.pack is not None
    held = list(batches(task.pack(task.heldout), model.chunk))

    def judge(params: PyTree) -> Found:
        ours, log = evaluate(model, params, whole, unseen, reference)
        numbers = {name: Measured(value) for name, value in ours.items()}
        numbers |= _over_rows(log)
        kl = float(metrics.output_kl(model.apply, task.original, params, held))
        return Found(numbers | {"heldout_kl": Measured(kl)})

    return judge


def _over_rows(log: Log) -> dict[str, Measured]:
    """Return with their intervals the numbers that are means over rows, and the same in our log."""
    scores = {
        "forget_Q_A_Prob": log["forget_Q_A_Prob"].rows["prob"],
        "extraction_strength": log["jedit_extraction_strength"].rows["score"],
    }
    for short in ("forget", "retain"):
        name = f"{short}_Q_A_ROUGE"
        scores[name] = log[name].rows["rougeL_recall"]
    return {name: mean_over(values) for name, values in scores.items()}


def compared(records: Sequence[Record]) -> list[Record]:
    """Return the records with what compares a model with the untouched and the retrained one."""
    found = {
        record["method"]: _values(record) for record in records if record["method"] in REFERENCES
    }
    untouched, retrained = found[UNTOUCHED], found[RETRAINED]
    whole = []
    for record in records:
        row = _values(record)
        added = {}
        if set(row) >= set(retrained):  # a destroyed model has not all of them
            added = aggregates(row, untouched, retrained)
            if retrained["mia_min_k"] < 1:
                added["privleak"] = metrics.privleak(row["mia_min_k"], retrained["mia_min_k"])
        numbers = {name: Measured(value)._asdict() for name, value in added.items()}
        whole.append({**record, "numbers": {**record["numbers"], **numbers}})
    return whole


def _values(record: Record) -> dict[str, float]:
    found = {name: x["value"] for name, x in record["numbers"].items()}
    return {name: value for name, value in found.items() if value is not None}


def best_records(records: Sequence[Record], share: float) -> list[Record]:
    """Return each method's records at its best point: of the first seed chosen, of others shown.

    Args:
        records: the records of all runs, the untouched and the retrained model's first.
        share: what a point has to keep of the untouched model's utility.
    """
    untouched = _values(records[0]).get("model_utility", 0.0)
    methods: dict[str, list[Record]] = {}
    for record in records[len(REFERENCES) :]:
        methods.setdefault(record["method"], []).append(record)
    chosen = list(records[: len(REFERENCES)])
    for mine in methods.values():
        first = mine[0]["seed"]
        tried = [_point(record) for record in mine if record["seed"] == first]
        point = best_of(tried, untouched, share)["point"]
        at = [record for record in mine if record["point"] == point]
        chosen += [record for record in at if record["seed"] != first] or at
    return chosen


def _point(record: Record) -> dict[str, Any]:
    values = _values(record)
    return {
        "point": record["point"],
        "quality": values.get("forget_quality", 0.0),
        "utility": values.get("model_utility", 0.0),
    }


def best_of(points: Sequence[Record], untouched: float, share: float) -> Record:
    """Return the best point by the rule of the comparison.

    It is the one of the greatest "utility" whose "quality" passes, of those that keep the share of
    the untouched model's utility, or of all where none does; where none passes it is the one of
    the greatest quality.
    """
    kept = [p for p in points if p["utility"] >= share * untouched] or points

    def rank(point: Record) -> tuple[bool, float]:
        passes = point["quality"] > PASSING_QUALITY
        return passes, point["utility"] if passes else point["quality"]

    return max(kept, key=rank)
