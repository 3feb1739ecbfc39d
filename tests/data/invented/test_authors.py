"""The fictitious authors: reproducible, diverse, and every wrong answer wrong."""

from collections import Counter

import numpy as np
import pytest

from jedit.data.invented import authors
from jedit.data.invented.author_templates import TEMPLATES
from jedit.data.invented.authors import ATTRIBUTES, generate_authors

NUM_AUTHORS = 60


@pytest.fixture(scope="module", params=[0, 7])
def rows(request):
    return generate_authors(request.param, NUM_AUTHORS, len(ATTRIBUTES))


def test_equal_seeds_give_equal_facts_and_no_global_state_moves():
    np.random.seed(3)  # noqa: NPY002 (the global state is what this test watches)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = generate_authors(5, 12, 9)
    np.random.seed(4)  # noqa: NPY002
    assert generate_authors(5, 12, 9) == first
    assert generate_authors(6, 12, 9) != first
    np.random.seed(3)  # noqa: NPY002
    generate_authors(5, 12, 9)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize(("num_authors", "facts_per_author"), [(1, 1), (3, 22), (40, 10)])
def test_the_numbers_are_those_asked_for(num_authors, facts_per_author):
    rows = generate_authors(0, num_authors, facts_per_author)
    counts = Counter(row.fields["author"] for row in rows)
    assert len(counts) == num_authors
    assert set(counts.values()) == {facts_per_author}
    assert len({(row.fields["author"], row.fields["attribute"]) for row in rows}) == len(rows)


def test_names_and_questions_are_unique(rows):
    names = {row.fields["author"] for row in rows}
    assert len(names) == NUM_AUTHORS
    assert not [(a, b) for a in names for b in names if a != b and a in b]
    assert len({row.question for row in rows}) == len(rows)
    assert len({(row.question, row.answer) for row in rows}) == len(rows)
    books = [
        row.fields["value"]
        for row in rows
        if row.fields["attribute"] in ("first_book", "famous_book")
    ]
    assert len(set(books)) == 2 * NUM_AUTHORS


def test_the_largest_set_has_no_repeats():
    rows = generate_authors(1, authors.MAX_AUTHORS, 4)
    assert len({row.fields["author"] for row in rows}) == authors.MAX_AUTHORS
    assert len({row.question for row in rows}) == len(rows)


def test_every_wording_is_complete(rows):
    for row in rows:
        for text in (row.question, row.answer, row.paraphrased_answer, *row.perturbed_answer):
            assert "{" not in text
            assert "}" not in text
            assert text[0].isupper()
            assert text[-1] in ".?"
        assert row.question != row.paraphrased_question
        assert row.answer != row.paraphrased_answer
        if row.fields["attribute"] != "identity":
            assert row.fields["author"] in row.question
            assert row.fields["author"] in row.paraphrased_question


def test_right_answers_hold_the_value_and_wrong_ones_do_not(rows):
    for row in rows:
        assert row.fields["value"] in row.answer
        assert row.fields["value"] in row.paraphrased_answer
        assert row.fields["value"] not in row.question
        assert len(row.perturbed_answer) == authors.NUM_PERTURBED
        assert len(set(row.perturbed_answer)) == authors.NUM_PERTURBED
        for wrong in row.perturbed_answer:
            assert wrong not in (row.answer, row.paraphrased_answer)
            assert row.fields["value"] not in wrong


def test_wrong_answers_have_the_form_of_the_paraphrase(rows):
    """Outside the value and its article they say the same, word for word."""
    for row in rows:
        start, end = (
            row.paraphrased_answer.split(row.fields["value"])[0],
            row.paraphrased_answer.split(row.fields["value"])[-1],
        )
        start = start.removesuffix(" a ").removesuffix(" an ")
        for wrong in row.perturbed_answer:
            assert wrong.startswith(start)
            assert wrong.endswith(end)


def test_guessing_the_most_common_value_is_rarely_right(rows):
    for attribute in ATTRIBUTES:
        values = Counter(
            row.fields["value"] for row in rows if row.fields["attribute"] == attribute
        )
        share = max(values.values()) / sum(values.values())
        # The smallest pool has 30 values, which 60 authors use twice each.
        assert share <= 2 / NUM_AUTHORS + 1e-12, attribute


def test_values_are_drawn_equally_often():
    rows = generate_authors(2, 50, len(ATTRIBUTES))
    genres = Counter(row.fields["value"] for row in rows if row.fields["attribute"] == "genre")
    assert sorted(genres.values()) == 30 * [1] + 10 * [2]


def test_every_wording_of_every_attribute_is_used(rows):
    for attribute, template in TEMPLATES.items():
        assert len(template.questions) >= 4
        assert len(template.answers) >= 3
        assert len(set(template.questions)) == len(template.questions)
        openings = {q.split("{")[0] for q in template.questions}
        asked = [row.question for row in rows if row.fields["attribute"] == attribute]
        assert all(any(q.startswith(o) for q in asked) for o in openings), attribute


def test_articles_and_pronouns_agree(rows):
    women = {name for region in authors.values.REGIONS for name in region[0]}
    for row in rows:
        for text in (row.answer, row.paraphrased_answer, *row.perturbed_answer):
            words = text.split()
            for article, word in zip(words[:-1], words[1:], strict=True):
                if row.fields["attribute"].endswith(("profession", "job")) and article in (
                    "a",
                    "an",
                ):
                    assert (article == "an") == (word[0] in "aeiou")
            is_woman = any(row.fields["author"].startswith(name + " ") for name in women)
            other = {"he", "his", "He", "His"} if is_woman else {"she", "her", "She", "Her"}
            assert not other & set(words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 3), "num_authors must be from 1 to 300, got 0"),
        ((0, 301, 3), "num_authors must be from 1 to 300, got 301"),
        ((0, 3, 23), "facts_per_author must be from 1 to 22, got 23"),
    ],
)
def test_numbers_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_authors(*arguments)
