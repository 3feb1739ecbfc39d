"""A seeded generator of question-answer pairs about fictitious authors.

The task is that of TOFU (Maini et al., 2024, "TOFU: A Task of Fictitious Unlearning for LLMs"):
facts that no model can know from elsewhere, each with a paraphrased right answer and several wrong
ones of the same form, so that a truth ratio can be taken. Names, titles and wordings are this
project's own.

Within an attribute every value is drawn equally often (up to one), so a model that has learned the
form of the answers alone gains little by guessing, and an author that was never seen stays unknown.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jedit.core.checks import Range, check_numbers
from jedit.data.invented import author_values as values
from jedit.data.invented.author_templates import TEMPLATES
from jedit.data.jsonl import QaRow

ATTRIBUTES = tuple(TEMPLATES)
MAX_AUTHORS = 300
NUM_PERTURBED = 5

_POOLS = {
    "birth_year": values.BIRTH_YEARS,
    "birthday": values.BIRTHDAYS,
    "father_profession": values.PROFESSIONS,
    "mother_profession": values.PROFESSIONS,
    "genre": values.GENRES,
    "style": values.STYLES,
    "theme": values.THEMES,
    "award": values.AWARDS,
    "teacher": values.TEACHERS,
    "college": values.COLLEGES,
    "first_job": values.FIRST_JOBS,
    "publisher": values.PUBLISHERS,
    "residence": values.HOMES,
    "hobby": values.HOBBIES,
    "writing_habit": values.HABITS,
    "influence": values.INFLUENCES,
    "translation": values.LANGUAGES,
    "character": values.CHARACTERS,
}


class _Author(NamedTuple):
    name: str
    is_woman: bool
    values: dict[str, str]
    strangers: tuple[str, ...]  # names of the same region that belong to nobody


def generate_authors(seed: int, num_authors: int, facts_per_author: int) -> list[QaRow]:
    """Make questions and answers about fictitious authors, author by author.

    Equal arguments give equal rows; no global state is read or changed. Each author has a random
    choice of attributes. All full names, and all questions, are different.

    A row's `fields` say of which author it is (`author`, the full name), what it asks (`attribute`,
    one of `ATTRIBUTES`), and the keyword that an answer must contain to be right (`value`). Its
    five wrong answers have the words of its paraphrased answer.

    Args:
        seed: the seed of the generator.
        num_authors: number of authors, up to 300.
        facts_per_author: number of questions about each author, up to the number of attributes, 22.

    Returns:
        `num_authors * facts_per_author` rows.

    Raises:
        ValueError: a number is out of its range.
    """
    check_numbers(Range(1, MAX_AUTHORS, is_whole=True), num_authors=num_authors)
    check_numbers(Range(1, len(ATTRIBUTES), is_whole=True), facts_per_author=facts_per_author)
    rng = np.random.default_rng(seed)
    rows = []
    for author in _make_authors(rng, num_authors):
        chosen = np.sort(rng.permutation(len(ATTRIBUTES))[:facts_per_author])
        rows += [_make_row(rng, author, ATTRIBUTES[i]) for i in chosen]
    return rows


def _make_authors(rng: np.random.Generator, num_authors: int) -> list[_Author]:
    drawn = {name: _balanced(rng, pool, num_authors) for name, pool in _POOLS.items()}
    # Both titles come out of one permutation, so that no two authors share a book.
    books = _balanced(rng, values.BOOKS, 2 * num_authors)
    drawn["first_book"], drawn["famous_book"] = books[::2], books[1::2]

    regions = _balanced(rng, range(len(values.REGIONS)), num_authors)
    people = [_shuffled(rng, _people(region)) for region in range(len(values.REGIONS))]
    towns = [_shuffled(rng, region[3]) for region in values.REGIONS]
    members = [regions.count(region) for region in range(len(values.REGIONS))]
    seen = [0] * len(values.REGIONS)
    authors = []
    for i, region in enumerate(regions):
        name, is_woman = people[region][seen[region]]
        own = {attribute: column[i] for attribute, column in drawn.items()}
        own["birthplace"] = towns[region][seen[region] % len(towns[region])]
        own["identity"] = name
        strangers = tuple(stranger for stranger, _ in people[region][members[region] :])
        authors.append(_Author(name, is_woman, own, strangers))
        seen[region] += 1
    return authors


def _people(region: int) -> list[tuple[str, bool]]:
    women, men, surnames, _ = values.REGIONS[region]
    return [
        (f"{given} {surname}", is_woman)
        for names, is_woman in ((women, True), (men, False))
        for given in names
        for surname in surnames
    ]


def _make_row(rng: np.random.Generator, author: _Author, attribute: str) -> QaRow:
    question, other_question = _shuffled(rng, TEMPLATES[attribute].questions)[:2]
    answer, paraphrase = _shuffled(rng, TEMPLATES[attribute].answers)[:2]
    value = author.values[attribute]
    wrong = _wrong_values(rng, author, attribute)
    fill = _filler(author)
    return QaRow(
        question=fill(question, value),
        answer=fill(answer, value),
        paraphrased_question=fill(other_question, value),
        paraphrased_answer=fill(paraphrase, value),
        perturbed_answer=tuple(fill(paraphrase, other) for other in wrong),
        fields={"author": author.name, "attribute": attribute, "value": value},
    )


def _wrong_values(rng: np.random.Generator, author: _Author, attribute: str) -> list[str]:
    """Return other values of the attribute; none contains the right one or is a part of it."""
    right = author.values[attribute].lower()
    if attribute == "identity":
        pool: Sequence[str] = author.strangers
    elif attribute == "birthplace":
        pool = [town for region in values.REGIONS for town in region[3]]
    elif attribute in ("first_book", "famous_book"):
        pool = values.BOOKS
    else:
        pool = _POOLS[attribute]
    others = _shuffled(rng, pool)
    apart = [x for x in others if x.lower() not in right and right not in x.lower()]
    return apart[:NUM_PERTURBED]


def _filler(author: _Author) -> Callable[[str, str], str]:
    they, their = ("she", "her") if author.is_woman else ("he", "his")

    def fill(template: str, value: str) -> str:
        return template.format(
            name=author.name,
            value=value,
            a_value=f"{'an' if value[0] in 'aeiou' else 'a'} {value}",
            they=they,
            They=they.title(),
            their=their,
            Their=their.title(),
            book=author.values["first_book"],
            town=author.values["birthplace"],
        )

    return fill


def _shuffled(rng: np.random.Generator, items: Sequence) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def _balanced(rng: np.random.Generator, items: Sequence, count: int) -> list:
    """Draw `count` items in random order, each as often as any other, up to one."""
    drawn = []
    while len(drawn) < count:
        drawn += _shuffled(rng, items)
    return drawn[:count]
