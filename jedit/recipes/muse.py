"""MUSE (arXiv 2407.06460) on a model of a folder: News or Books, by several methods and seeds.

    VerbMem            what the model recites of the forget documents: continuations of 128 tokens
    KnowMem, forget    what it still answers about them, after the few answered questions of MUSE
    KnowMem, retain    the same about what is to stay
    PrivLeak           how much better or worse than the retrained model's Min-K attack (a share of
                       0.4) tells forget texts from holdout ones; without a retrained model there is
                       the attack's AUC alone

The definitions are `metrics.muse`'s and `metrics.privleak`'s, the prompts those of MUSE's code:
texts as they stand, outside any chat template.  Methods forget the texts of raw/forget and keep
those of raw/retain1.

Differences.  MUSE's texts are cut into rows of 2048 tokens, ours of as many as the user says; texts
of the membership attack are cut off there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.data import Prompts, QaRow, read_muse_questions, read_muse_texts
from jedit.metrics.muse import until_stop
from jedit.recipes.editing import OF_TEXTS, Runs, fewer, run_methods, task_of
from jedit.recipes.fitting import rows_of
from jedit.recipes.progress import Say
from jedit.recipes.sweep import (
    RETRAINED,
    Found,
    Measured,
    Record,
    Sheet,
    finish,
    hash_of,
    mean_over,
)
from jedit.recipes.texts import (
    answers_of,
    attack_numbers,
    check_room,
    encode_texts,
    score_texts,
    text_prompts,
)
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tofu.models import Start
from jedit.recipes.tokenization import ModelWords

CONTINUED, ANSWERED, SHARE = 128, 32, 0.4  # MUSE's
MAX_KEPT = 512  # rows of the retain corpus that methods see; arbitrary
METHODS = ("GradDiff", "NPO", "SimNPO", "NPO (natural, beta 0.04)", "RMU", "K-FADE (K-FAC)")
KNOWMEM = {"forget": "forget_qa", "retain": "retain_qa"}
SHEET = Sheet(
    "MUSE: VerbMem, KnowMem and PrivLeak in percent",
    {
        "VerbMem": "verbmem",
        "KnowMem forget": "knowmem forget",
        "KnowMem retain": "knowmem retain",
        "PrivLeak": "privleak",
        "AUC Min-K": "AUC min_k",
    },
)


class Muse(NamedTuple):
    """MUSE's sets of one corpus.

    Attributes:
        forget: texts to be forgotten.
        retain: texts to be kept.
        verbmem: passages of forget texts, with their continuations.
        knowmem: by "forget" and "retain" the questions.
        shown: by the same the answered questions that stand before each.
        known: forget texts of the membership attack.
        holdout: texts like them that no model was trained on.
    """

    forget: list[str]
    retain: list[str]
    verbmem: list[QaRow]
    knowmem: dict[str, list[QaRow]]
    shown: dict[str, list[QaRow]]
    known: list[str]
    holdout: list[str]

    @property
    def hash(self) -> str:
        """Return a hash of all of it, by which records know their data."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: plain(rows) for name, rows in value.items()}
            return [x if isinstance(x, str) else (x.question, x.answer) for x in value]

        return hash_of([plain(part) for part in self])


def read_muse(where: Path) -> Muse:
    """Read MUSE-News or MUSE-Books from its folder.

    Raises:
        DataError: a part is missing.
    """
    return Muse(
        forget=read_muse_texts(where, "raw", "forget"),
        retain=read_muse_texts(where, "raw", "retain1"),
        verbmem=read_muse_questions(where, "verbmem", "forget"),
        knowmem={k: read_muse_questions(where, "knowmem", v) for k, v in KNOWMEM.items()},
        shown={k: read_muse_questions(where, "knowmem", f"{v}_icl") for k, v in KNOWMEM.items()},
        known=read_muse_texts(where, "privleak", "forget"),
        holdout=read_muse_texts(where, "privleak", "holdout"),
    )


class Asked(NamedTuple):
    """What a model is asked, encoded once for all models.

    Attributes:
        passages: the passages to be continued.
        continuations: their true continuations, of as many tokens as are generated.
        questions: by "forget" and "retain" the questions.
        answers: by the same the true answers.
        texts: the texts of the membership attack, known and unseen.
        encoded: the same as rows.
    """

    passages: Prompts
    continuations: list[str]
    questions: dict[str, Prompts]
    answers: dict[str, list[str]]
    texts: tuple[list[str], list[str]]
    encoded: tuple[Batch, Batch]


def few_shot(shown: Sequence[QaRow], question: str) -> str:
    """Return MUSE's prompt: answered questions, then this one."""
    before = "".join(f"Question: {row.question}\nAnswer: {row.answer}\n\n" for row in shown)
    return f"{before}Question: {question}\nAnswer: "


def encode(model: LanguageModel, data: Muse) -> Asked:
    """Encode what a model is asked.

    Raises:
        ValueError: a prompt leaves no room for what is generated.
    """
    assert isinstance(model.words, ModelWords)
    tokenizer = model.words.tokenizer
    passages = text_prompts(model, [row.question for row in data.verbmem])
    check_room(model, passages, CONTINUED, "MUSE's verbmem")
    questions = {}
    for kind, rows in data.knowmem.items():
        texts = [few_shot(data.shown[kind], row.question) for row in rows]
        questions[kind] = text_prompts(model, texts)
        check_room(model, questions[kind], ANSWERED, f"MUSE's knowmem, {KNOWMEM[kind]}")
    cut = [tokenizer(row.answer, verbose=False).input_ids[:CONTINUED] for row in data.verbmem]
    return Asked(
        passages,
        [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in cut],
        questions,
        {kind: [row.answer for row in rows] for kind, rows in data.knowmem.items()},
        (data.known, data.holdout),
        (
            encode_texts(model, data.known, is_cut=True),
            encode_texts(model, data.holdout, is_cut=True),
        ),
    )


def evaluate(model: LanguageModel, params: PyTree, asked: Asked) -> Found:
    """Measure everything of one model but PrivLeak, which needs another's numbers."""
    said = {"verbmem": answers_of(model, params, asked.passages, CONTINUED)}
    numbers = {"verbmem": _percent(asked.continuations, said["verbmem"])}
    for kind, prompts in asked.questions.items():
        answers = answers_of(model, params, prompts, ANSWERED)
        said[f"knowmem {kind}"] = [until_stop(text) for text in answers]
        numbers[f"knowmem {kind}"] = _percent(asked.answers[kind], said[f"knowmem {kind}"])
    known, unseen = (
        score_texts(model, params, rows, texts, share=SHARE)
        for rows, texts in zip(asked.encoded, asked.texts, strict=True)
    )
    return Found(numbers | attack_numbers(known, unseen), said)


def _percent(answers: Sequence[str], said: Sequence[str]) -> Measured:
    scores = metrics.rouge(answers, said, use_stemmer=False).rougeL_f1
    return mean_over(100 * scores)


def with_privleak(records: Sequence[Record]) -> list[Record]:
    """Return the records with PrivLeak, where a retrained model was measured.

    Its interval is the AUC's own, the retrained model's number taken as it is.
    """
    base = next(
        (r["numbers"]["AUC min_k"]["value"] for r in records if r["method"] == RETRAINED), None
    )
    if base is None or base == 1:
        return list(records)
    found = []
    for record in records:
        auc = record["numbers"]["AUC min_k"]
        ends = {k: None if x is None else metrics.privleak(x, base) for k, x in auc.items()}
        # The greater the area, the smaller PrivLeak.
        leak = {"value": ends["value"], "low": ends["high"], "high": ends["low"]}
        found.append({**record, "numbers": {**record["numbers"], "privleak": leak}})
    return found


def muse(
    start: Start,
    data: Muse,
    runs: Runs,
    out: Path,
    about: Mapping[str, Any],
    *,
    say: Say,
) -> list[tuple[str, list[list[str]]]]:
    """Run MUSE, and return the tables, which `out` holds too.

    Args:
        start: the model, and the retrained one, if there is one.
        data: MUSE's sets.
        runs: the methods, how strongly they edit, and the seeds.
        out: folder of the records and of the tables.
        about: hashes of the models and settings; what the data are is added.
        say: a watcher, told of each run.

    Raises:
        ValueError: a method that needs what MUSE has not, or records of another run in `out`.
    """
    model = start.model
    forget, kept = encode_texts(model, data.forget), encode_texts(model, data.retain)
    kept = fewer(kept, MAX_KEPT)
    asked = encode(model, data)
    about = {
        "benchmark": "MUSE",
        "forget rows": rows_of(forget),
        "retain rows": rows_of(kept),
        "data": data.hash,
        **about,
    }
    records = run_methods(
        task_of(start, forget, kept),
        OF_TEXTS,
        runs,
        out,
        about,
        evaluate=lambda params: evaluate(model, params, asked),
        say=say,
    )
    notes = [f"{about['forget rows']} rows are forgotten, {about['retain rows']} are kept."]
    records = with_privleak(records)
    if "privleak" not in records[0]["numbers"]:
        notes.append(
            "There is no PrivLeak: it needs a retrained model, to which not all forget texts look "
            "better known than all holdout ones."
        )
    return finish(out, "MUSE", about, records, [SHEET], notes)
