"""RWKU's files about one person: what is forgotten, what is kept, and what is asked."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from jedit.data import DataError, QaRow, read_rwku, read_rwku_texts, read_texts
from jedit.data.records import ENDINGS, read_records
from jedit.recipes.sweep import hash_of

FORGET_PARTS = ("forget_level1", "forget_level2", "forget_level3")
NEIGHBOR_PARTS = ("neighbor_level1", "neighbor_level2")
UTILITY = ("retain_mmlu", "triviaqa")
# The nine attacks of level 3, by the files' own word for each; cross lingual ones name a language.
ATTACKS = (
    "prefix injection",
    "affirmative suffix",
    "role play",
    "multiple choice",
    "reverse query",
    "synonym manipulation",
    "context hint",
    "incontext learning",
    "cross lingual",
)


class Rwku(NamedTuple):
    """What RWKU has about one person.

    Attributes:
        target: the person's name.
        passages: texts about the person, which are forgotten.
        kept: texts about others, which are kept.
        probes: by part the questions that are asked.
        known: texts about the person, of the membership attacks.
        unseen: texts about others, of the membership attacks.
        utility: records of the utility sets whose files are there: MMLU's with five examples to
            each question, TriviaQA's with the right answers.
    """

    target: str
    passages: list[str]
    kept: list[str]
    probes: dict[str, list[QaRow]]
    known: list[str]
    unseen: list[str]
    utility: dict[str, list[dict[str, Any]]]

    @property
    def hash(self) -> str:
        """Return a hash of all of it, by which records know their data."""
        probes = {
            part: [(row.question, row.answer, row.fields) for row in rows]
            for part, rows in self.probes.items()
        }
        return hash_of(self._replace(probes=probes))


def attack_of(row: QaRow) -> str:
    """Return which of the nine attacks a question of level 3 is.

    Raises:
        DataError: the row names none of them.
    """
    kind = str(row.fields.get("type", ""))
    for attack in ATTACKS:
        if kind.startswith(attack):
            return attack
    raise DataError(
        f'{row.where}: "type" is {kind!r}, none of RWKU\'s nine attacks: {", ".join(ATTACKS)}.'
    )


def people_of(data: Path) -> dict[str, Path]:
    """Return the folders of RWKU's people, by their names.

    Raises:
        DataError: there is no such folder, or nobody in it.
    """
    if not data.is_dir():
        raise DataError(f"{data}: there is no such folder.")
    where = data / "Target" if (data / "Target").is_dir() else data
    found = {
        re.sub(r"^\d+_", "", folder.name).replace("_", " "): folder
        for folder in sorted(where.iterdir())
        if any((folder / f"passage{ending}").is_file() for ending in ENDINGS)
    }
    if not found:
        raise DataError(
            f"{where}: holds no folder of a person with a file passage{ENDINGS[1]}; RWKU's lie in "
            "Target/1_Stephen_King, Target/2_Confucius, ..."
        )
    return found


def read_person(data: Path, target: str, retain: Path | None = None) -> Rwku:
    """Read what RWKU has about one person.

    Args:
        data: RWKU's folder, or one that holds some of its people's folders.
        target: the person's name, or that of the folder.
        retain: a file of texts to be kept; None: the passages about all other people there.

    Raises:
        DataError: the person is not there, a file is missing, or there is nothing to keep.
    """
    people = people_of(data)
    wanted = re.sub(r"^\d+_", "", target).replace("_", " ").casefold()
    name = next((name for name in people if name.casefold() == wanted), None)
    if name is None:
        some = ", ".join(list(people)[:5]) + (", ..." if len(people) > 5 else "")
        raise DataError(f"{target!r} is not among the {len(people)} people of {data}: {some}")
    folder = people[name]
    if retain is None:
        others = [other for person, other in people.items() if person != name]
        if not others:
            raise DataError(
                f"{data}: has nobody but {name}, and so no passages to keep; name a file of texts "
                "with --retain"
            )
        kept = [text for other in others for text in read_rwku_texts(other, "passage")]
    else:
        kept = read_texts(retain)
    probes = {part: read_rwku(folder, part) for part in (*FORGET_PARTS, *NEIGHBOR_PARTS)}
    for row in probes["forget_level3"]:
        attack_of(row)
    return Rwku(
        target=name,
        passages=read_rwku_texts(folder, "passage"),
        kept=kept,
        probes=probes,
        known=read_rwku_texts(folder, "forget_mia"),
        unseen=read_rwku_texts(folder, "retain_mia"),
        utility=_utility(folder),
    )


def _utility(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the utility sets that lie beside a person's files, as RWKU's own copy has them."""
    return {
        name: read_records(folder, name)
        for name in UTILITY
        if any((folder / f"{name}{ending}").is_file() for ending in ENDINGS)
    }
