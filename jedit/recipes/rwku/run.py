"""RWKU on a model of a folder: forget one person by several methods, and measure before and after.

RWKU gives no retain corpus: what is kept are passages about its other people, or the user's own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jedit.methods.row import Need
from jedit.recipes.editing import OF_TEXTS, Runs, fewer, run_methods, task_of
from jedit.recipes.fitting import rows_of
from jedit.recipes.progress import Say
from jedit.recipes.rwku.evaluation import SHEETS, encode, evaluate
from jedit.recipes.rwku.sets import Rwku
from jedit.recipes.scenes.question_answer import REFUSAL
from jedit.recipes.sweep import finish
from jedit.recipes.texts import encode_texts
from jedit.recipes.tofu.models import Start

Corpus = Literal["passages", "questions"]
MAX_KEPT = 512  # rows of the retain corpus: two hundred people have thousands; arbitrary
METHODS = (
    "gradient ascent",
    "GradDiff",
    "NPO",
    "NPO (natural, beta 0.04)",
    "RMU",
    "K-FADE (K-FAC)",
)


def needs_met(corpus: Corpus) -> frozenset[Need]:
    """Return what methods can be given: the person's questions have refusals and a position."""
    return OF_TEXTS if corpus == "passages" else OF_TEXTS | {Need.SUBJECTS, Need.REFUSALS}


def rwku(
    start: Start,
    data: Rwku,
    runs: Runs,
    out: Path,
    about: Mapping[str, Any],
    *,
    corpus: Corpus = "passages",
    say: Say,
) -> list[tuple[str, list[list[str]]]]:
    """Run RWKU for one person, and return the tables, which `out` holds too.

    Args:
        start: the model.
        data: what RWKU has about the person.
        runs: the methods, how strongly they edit, and the seeds.
        out: folder of the records and of the tables.
        about: the model's hash and settings; what the data are is added.
        corpus: what is forgotten: the passages about the person, or the questions of level 2 with
            their answers, which then are among what is asked.
        say: a watcher, told of each run.

    Raises:
        ValueError: a method that needs what RWKU has not, or records of another run in `out`.
    """
    model = start.model
    kept = fewer(encode_texts(model, data.kept), MAX_KEPT)
    asked = encode(model, data)
    questions = data.probes["forget_level2"]
    refusals = None
    if corpus == "passages":
        forget = encode_texts(model, data.passages)
    else:
        forget = model.encode([(row.question, row.answer) for row in questions])
        refusals = model.encode([(row.question, REFUSAL) for row in questions])
    about = {
        "benchmark": "RWKU",
        "target": data.target,
        "corpus": corpus,
        "forget rows": rows_of(forget),
        "retain rows": rows_of(kept),
        "data": data.hash,
        **about,
    }
    task = task_of(start, forget, kept, refusals)
    records = run_methods(
        task,
        needs_met(corpus),
        runs,
        out,
        about,
        evaluate=lambda params: evaluate(model, params, asked),
        say=say,
    )
    notes = [
        f"{about['forget rows']} rows are forgotten ({corpus} about {data.target}), "
        f"{about['retain rows']} are kept."
    ]
    return finish(out, f"RWKU: forget {data.target}", about, records, SHEETS, notes)
