"""The field's published sets as rows: TOFU, MUSE, WMDP, RWKU, CounterFact, zsRE.

Every reader takes `where`, a local folder or the data set's "owner/name" (see `read_records`), and
returns rows of one of three kinds: questions with answers (`QaRow`), multiple choices (`Choice`),
and facts to be rewritten (`Rewrite`); or plain texts.

Fields are those of the sets as published (TOFU arXiv 2401.06121, MUSE 2407.06460, WMDP 2403.03218,
RWKU 2406.10890, CounterFact 2202.05262; zsRE in the form of MEND's evaluation file, 2110.11309).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jedit.data.jsonl import DataError, QaRow
from jedit.data.records import check_name, read_records

TOFU_ROWS_PER_AUTHOR = 20
TOFU_AUTHORS = 200
WMDP_SUBJECTS = ("bio", "cyber", "chem")
MUSE_TEXTS = ("raw", "privleak", "scal", "sust", "train")


class Choice(NamedTuple):
    """A question with several options, of which one is right.

    Attributes:
        question: text of the question.
        choices: texts of the options.
        answer: index of the right option.
    """

    question: str
    choices: tuple[str, ...]
    answer: int


class Rewrite(NamedTuple):
    """A fact of CounterFact or zsRE, what it is to become, and prompts that ask whether it has.

    Attributes:
        prompt: text that the object follows.
        subject: whom or what the fact is about, as it stands in the prompt.
        target_true: the object that the model knows; for zsRE one that it may not know.
        target_new: the object that the model is to say after the edit.
        paraphrase_prompts: other texts that the same object follows.
        neighborhood_prompts: texts about other subjects.
        neighborhood_answers: the answers that follow `neighborhood_prompts`, one for each, which
            are to stay.
    """

    prompt: str
    subject: str
    target_true: str
    target_new: str
    paraphrase_prompts: tuple[str, ...]
    neighborhood_prompts: tuple[str, ...]
    neighborhood_answers: tuple[str, ...]


def read_tofu(where: str | Path, split: str) -> list[QaRow]:
    """Read a split of TOFU: "full", "forget10", "retain90", "forget10_perturbed", "world_facts" ...

    The field `author` of each row of a full, forget or retain split is "author K", with K from 0 in
    the order of the full set, which has 20 rows for each. The perturbed answers of real_authors and
    world_facts are their options without the right one.
    """
    records = read_records(where, split)
    first = _first_author(split, len(records))
    rows = []
    for i, record in enumerate(records):
        place = f"{where}, {split}, record {i + 1}"
        answer = _text(record, "answer", place)
        options = [v for k, v in record.items() if k.startswith("option") and v != answer]
        author = {} if first is None else {"author": f"author {first + i // TOFU_ROWS_PER_AUTHOR}"}
        rows.append(
            QaRow(
                question=_text(record, "question", place),
                answer=answer,
                paraphrased_question=record.get("paraphrased_question"),
                paraphrased_answer=record.get("paraphrased_answer"),
                perturbed_answer=tuple(record.get("perturbed_answer") or options),
                fields=author,
                file=f"{where}/{split}",
                line=i + 1,
            )
        )
    return rows


def read_muse_texts(where: str | Path, subset: str, split: str) -> list[str]:
    """Read texts of MUSE-News or MUSE-Books.

    Args:
        where: the folder or name of one of the two corpora.
        subset: "raw", "privleak", "scal", "sust" or "train".
        split: a part of the subset: "forget", "retain1", "retain2", "holdout", "forget_1", ...

    Raises:
        DataError: another subset, or records without their fields.
    """
    if subset not in MUSE_TEXTS:
        raise DataError(f"subset must be one of {', '.join(MUSE_TEXTS)}, got {subset!r}.")
    records = read_records(where, subset, split)
    return [_text(r, "text", f"{where}, {subset}, {split}, record {i}") for i, r in _each(records)]


def read_muse_questions(where: str | Path, subset: str, split: str) -> list[QaRow]:
    """Read MUSE's questions.

    Args:
        where: the folder or name of one of the two corpora.
        subset: "verbmem", whose question is a passage and whose answer its continuation, or
            "knowmem".
        split: "forget" for verbmem; "forget_qa", "retain_qa", "forget_qa_icl" or "retain_qa_icl".

    Raises:
        DataError: another subset, or records without their fields.
    """
    names = {"verbmem": ("prompt", "gt"), "knowmem": ("question", "answer")}
    if subset not in names:
        raise DataError(f"subset must be verbmem or knowmem, got {subset!r}.")
    question, answer = names[subset]
    place = f"{where}, {subset}, {split}"
    return [
        QaRow(
            _text(record, question, f"{place}, record {i}"),
            _text(record, answer, f"{place}, record {i}"),
            file=place,
            line=i,
        )
        for i, record in _each(read_records(where, subset, split))
    ]


def read_wmdp(where: str | Path, subject: str) -> list[Choice]:
    """Read WMDP's questions about "bio", "cyber" or "chem", which are its test split.

    Raises:
        DataError: another subject, or records without their fields.
    """
    if subject not in WMDP_SUBJECTS:
        raise DataError(f"subject must be one of {', '.join(WMDP_SUBJECTS)}, got {subject!r}.")
    rows = []
    for i, record in _each(read_records(where, f"wmdp-{subject}", "test")):
        rows.append(choice_of(record, f"{where}, wmdp-{subject}, record {i}"))
    return rows


def choice_of(record: Mapping[str, Any], place: str) -> Choice:
    """Return a record of WMDP's or MMLU's form as a question with its options.

    Args:
        record: an object with "question", "choices" and "answer", the right one's index.
        place: where it stands, for messages.

    Raises:
        DataError: it has not these fields.
    """
    choices, answer = record.get("choices"), record.get("answer")
    if not (isinstance(choices, list) and isinstance(answer, int)):
        raise DataError(f'{place}: needs "choices", a list of strings, and "answer", a number.')
    if not all(isinstance(choice, str) for choice in choices):
        raise DataError(f'{place}: "choices" must be a list of strings.')
    if not 0 <= answer < len(choices):
        raise DataError(f"{place}: answer {answer} of {len(choices)} choices.")
    return Choice(_text(record, "question", place), tuple(choices), answer)


def read_rwku(where: str | Path, part: str, target: str | None = None) -> list[QaRow]:
    """Read RWKU's probes; a row's fields `subject` and `type` say whom it is about and what it is.

    Args:
        where: RWKU's folder or name.
        part: "forget_level1" (cloze, the blank written ___), "forget_level2" (questions),
            "forget_level3" (adversarial), "neighbor_level1", "neighbor_level2".
        target: one person's folder, "1_Stephen_King"; None: all of them.
    """
    records = _rwku_records(where, part, target)
    place = f"{where}, {part}"
    return [
        QaRow(
            _text(record, "query", f"{place}, record {i}"),
            _text(record, "answer", f"{place}, record {i}"),
            fields={name: record[name] for name in ("subject", "type") if record.get(name)},
            file=place,
            line=i,
        )
        for i, record in _each(records)
    ]


def read_rwku_texts(where: str | Path, part: str, target: str | None = None) -> list[str]:
    """Read RWKU's texts: "passage", "forget_mia", "retain_mia"."""
    place = f"{where}, {part}"
    records = _rwku_records(where, part, target)
    return [_text(record, "text", f"{place}, record {i}") for i, record in _each(records)]


def read_counterfact(where: str | Path, name: str = "counterfact") -> list[Rewrite]:
    """Read CounterFact, the file `counterfact.json` of its authors.

    Neighbourhood prompts are about subjects of which the old object is true, so that is what each
    of them is answered by.

    Raises:
        DataError: records without their fields.
    """
    rows = []
    for i, record in _each(read_records(where, name)):
        place = f"{where}, {name}, record {i}"
        asked = record.get("requested_rewrite")
        if not isinstance(asked, dict):
            raise DataError(f'{place}: needs "requested_rewrite", an object.')
        subject = _text(asked, "subject", place)
        old, new = (
            _text(asked.get(which) or {}, "str", place) for which in ("target_true", "target_new")
        )
        near = tuple(record.get("neighborhood_prompts") or ())
        rows.append(
            Rewrite(
                prompt=_text(asked, "prompt", place).replace("{}", subject),
                subject=subject,
                target_true=old,
                target_new=new,
                paraphrase_prompts=tuple(record.get("paraphrase_prompts") or ()),
                neighborhood_prompts=near,
                neighborhood_answers=(old,) * len(near),
            )
        )
    return rows


def read_zsre(where: str | Path, name: str = "zsre_mend_eval") -> list[Rewrite]:
    """Read zsRE as MEND's evaluation file has it; its one neighbour is an unrelated question.

    The neighbour's "nq question: " in front is taken off.

    Raises:
        DataError: records without their fields.
    """
    rows = []
    for i, record in _each(read_records(where, name)):
        place = f"{where}, {name}, record {i}"
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
            raise DataError(f'{place}: needs "answers", a list of strings.')
        rows.append(
            Rewrite(
                prompt=_text(record, "src", place),
                subject=_text(record, "subject", place),
                target_true=answers[0],
                target_new=_text(record, "alt", place),
                paraphrase_prompts=(_text(record, "rephrase", place),),
                neighborhood_prompts=(_text(record, "loc", place).removeprefix("nq question: "),),
                neighborhood_answers=(_text(record, "loc_ans", place),),
            )
        )
    return rows


def _each(records: list[dict[str, Any]]):
    return enumerate(records, 1)


def _text(record: Mapping[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        given = ", ".join(sorted(map(str, record))) or "none"
        raise DataError(f'{place}: needs "{name}", a string; its fields: {given}.')
    return value


def _first_author(split: str, num_rows: int) -> int | None:
    """Return the number of the first author; None where the split is not in authors' order."""
    if num_rows % TOFU_ROWS_PER_AUTHOR:
        return None
    if split.startswith("forget"):
        return TOFU_AUTHORS - num_rows // TOFU_ROWS_PER_AUTHOR
    is_ordered = split == "full" or (split.startswith("retain") and "perturbed" not in split)
    return 0 if is_ordered else None


def _rwku_records(where: str | Path, part: str, target: str | None) -> list[dict[str, Any]]:
    folder = Path(where)
    if folder.is_dir():
        nested = folder / "All" if target is None else folder / "Target" / check_name(target)
        if target is not None and not nested.is_dir():
            raise DataError(f"{folder}: RWKU has no folder Target/{target}.")
        if nested.is_dir():
            return read_records(nested, part, "test")
        return read_records(folder, part, "test")
    records = read_records(where, part, "test")
    if target is None:
        return records
    person = target.split("_", 1)[-1].replace("_", " ")
    return [record for record in records if record.get("subject") == person]
