"""The fictitious authors: reproducible, diverse, and every wrong answer wrong."""

from collections import Counter

import numpy as np
import pytest

from jedit.data.invented import authors
from jedit.data.invented.author_templates import TEMPLATES
from jedit.data.invented.authors import ATTRIBUTES, generate_authors

NUM_AUTHORS = 60


@pytest.fixture(scope="module", params=[0, 7])
def facts(request):
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
    facts = generate_authors(0, num_authors, facts_per_author)
    counts = Counter(fact.author for fact in facts)
    assert len(counts) == num_authors
    assert set(counts.values()) == {facts_per_author}
    assert len({(fact.author, fact.attribute) for fact in facts}) == len(facts)


def test_names_and_questions_are_unique(facts):
    names = {fact.author for fact in facts}
    assert len(names) == NUM_AUTHORS
    assert not [(a, b) for a in names for b in names if a != b and a in b]
    assert len({fact.question for fact in facts}) == len(facts)
    assert len({(fact.question, fact.answer) for fact in facts}) == len(facts)
    books = [fact.value for fact in facts if fact.attribute in ("first_book", "famous_book")]
    assert len(set(books)) == 2 * NUM_AUTHORS


def test_the_largest_set_has_no_repeats():
    facts = generate_authors(1, authors.MAX_AUTHORS, 4)
    assert len({fact.author for fact in facts}) == authors.MAX_AUTHORS
    assert len({fact.question for fact in facts}) == len(facts)


def test_every_wording_is_complete(facts):
    for fact in facts:
        for text in (fact.question, fact.answer, fact.paraphrase, *fact.perturbed):
            assert "{" not in text
            assert "}" not in text
            assert text[0].isupper()
            assert text[-1] in ".?"
        assert fact.question != fact.paraphrased_question
        assert fact.answer != fact.paraphrase
        if fact.attribute != "identity":
            assert fact.author in fact.question
            assert fact.author in fact.paraphrased_question


def test_right_answers_hold_the_value_and_wrong_ones_do_not(facts):
    for fact in facts:
        assert fact.value in fact.answer
        assert fact.value in fact.paraphrase
        assert fact.value not in fact.question
        assert len(fact.perturbed) == authors.NUM_PERTURBED
        assert len(set(fact.perturbed)) == authors.NUM_PERTURBED
        for wrong in fact.perturbed:
            assert wrong not in (fact.answer, fact.paraphrase)
            assert fact.value not in wrong


def test_wrong_answers_have_the_form_of_the_paraphrase(facts):
    """Outside the value and its article they say the same, word for word."""
    for fact in facts:
        start, end = fact.paraphrase.split(fact.value)[0], fact.paraphrase.split(fact.value)[-1]
        start = start.removesuffix(" a ").removesuffix(" an ")
        for wrong in fact.perturbed:
            assert wrong.startswith(start)
            assert wrong.endswith(end)


def test_guessing_the_most_common_value_is_rarely_right(facts):
    for attribute in ATTRIBUTES:
        values = Counter(fact.value for fact in facts if fact.attribute == attribute)
        share = max(values.values()) / sum(values.values())
        # The smallest pool has 30 values, which 60 authors use twice each.
        assert share <= 2 / NUM_AUTHORS + 1e-12, attribute


def test_values_are_drawn_equally_often():
    facts = generate_authors(2, 50, len(ATTRIBUTES))
    genres = Counter(fact.value for fact in facts if fact.attribute == "genre")
    assert sorted(genres.values()) == 30 * [1] + 10 * [2]


def test_every_wording_of_every_attribute_is_used(facts):
    for attribute, template in TEMPLATES.items():
        assert len(template.questions) >= 4
        assert len(template.answers) >= 3
        assert len(set(template.questions)) == len(template.questions)
        openings = {q.split("{")[0] for q in template.questions}
        asked = [fact.question for fact in facts if fact.attribute == attribute]
        assert all(any(q.startswith(o) for q in asked) for o in openings), attribute


def test_articles_and_pronouns_agree(facts):
    women = {name for region in authors.values.REGIONS for name in region[0]}
    for fact in facts:
        for text in (fact.answer, fact.paraphrase, *fact.perturbed):
            words = text.split()
            for article, word in zip(words[:-1], words[1:], strict=True):
                if fact.attribute.endswith(("profession", "job")) and article in ("a", "an"):
                    assert (article == "an") == (word[0] in "aeiou")
            is_woman = any(fact.author.startswith(name + " ") for name in women)
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
