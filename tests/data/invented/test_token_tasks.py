"""The invented tasks, row by row against their descriptions."""

import collections

import numpy as np
import pytest

from jedit.data.invented.token_tasks import NO, SETS, TASKS, YES, make_token_tasks

HIGH = "efgh"
SURE = {
    "first": lambda w: w[0] in HIGH,
    "last": lambda w: w[-1] in HIGH,
    "sum": lambda w: "abcdefgh".index(w[0]) + "abcdefgh".index(w[1]) > 7,
    "comparison": lambda w: w[0] > w[1],
    "majority": lambda w: sum(c in HIGH for c in w[:7]) >= 4,
    "parity": lambda w: sum(c in HIGH for c in w[:3]) in (1, 3),
    "repeat": lambda w: w.startswith(w[-1]),
    "contains": lambda w: "a" in w,
    "neighbours": lambda w: any(2 * c in w for c in "abcdefgh"),
}


@pytest.fixture(scope="module")
def made():
    return make_token_tasks(3, rows=300, judged=100)


def words(rows):
    """Each row's symbols as a text, and whether the answer is yes."""
    texts = ["".join("abcdefgh"[i] for i in row[1:]) for row in rows.tokens]
    return list(zip(texts, rows.answers == YES, strict=True))


@pytest.mark.parametrize("task", SURE)
def test_answers_are_right(made, task):
    for part in SETS:
        assert all(SURE[task](text) == is_yes for text, is_yes in words(made[task][part]))


def test_a_table_is_learnt_by_heart(made):
    found = collections.defaultdict(set)
    for part in SETS:
        for text, is_yes in words(made["by heart"][part]):
            found[text[2:4]].add(is_yes)
    assert all(len(answers) == 1 for answers in found.values())
    other = make_token_tasks(4, rows=300, judged=100)["by heart"]["train"]
    changed = [found[text[2:4]] != {is_yes} for text, is_yes in words(other) if text[2:4] in found]
    assert 0.3 < np.mean(changed) < 0.7


@pytest.mark.parametrize(("task", "slope"), [("vote", 1.0), ("clear vote", 3.0)])
def test_votes_have_the_odds_that_they_are_said_to_have(task, slope):
    rows = words(make_token_tasks(0, rows=20_000, judged=2)[task]["train"])
    number = np.array([sum(c in HIGH for c in text) for text, _ in rows])
    is_yes = np.array([yes for _, yes in rows])
    # The log odds themselves: half of all are yes, by the draw and by the balance of the sets.
    for count in (2, 3, 4, 5, 6):
        share, n = is_yes[number == count].mean(), np.sum(number == count)
        expected = 1 / (1 + np.exp(-slope * (count - 4)))
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n) + 1 / n


def test_sets_are_balanced_and_apart(made):
    assert set(made) == set(TASKS)
    heads = set()
    for parts in made.values():
        assert [len(parts[part].tokens) for part in SETS] == [300, 100, 100]
        for rows in parts.values():
            assert np.mean(rows.answers == YES) == 0.5
            assert set(rows.answers.tolist()) == {NO, YES}
        everything = np.concatenate([rows.tokens for rows in parts.values()])
        assert len(np.unique(everything, axis=0)) == 500
        heads |= set(everything[:, 0].tolist())
    assert len(heads) == len(TASKS)
    assert min(heads) > YES
    again = make_token_tasks(3, rows=300, judged=100)["sum"]["test"]
    np.testing.assert_array_equal(again.tokens, made["sum"]["test"].tokens)


def test_odd_numbers_are_refused():
    with pytest.raises(ValueError, match="even numbers"):
        make_token_tasks(0, rows=3, judged=2)
    with pytest.raises(ValueError, match="judged must"):
        make_token_tasks(0, rows=4, judged=0)
