"""The invented sentences have the probabilities that they are said to have."""

import collections

import numpy as np
import pytest

from jedit.data.invented.themes import FALL, HINTED, KEYWORDS, TRUST, Fact, make_themes


def test_keywords_come_as_often_as_their_ranks_say():
    """Counts of 40,000 sentences against the stated probabilities, five standard errors."""
    themes = make_themes(0)
    rng = np.random.default_rng(1)
    sentences = [themes.draw(rng) for _ in range(40000)]
    words = set(themes.words)
    signs = {sign: keyword for keyword, sign in themes.hints.items()}
    theme_of = {word: theme for theme, found in KEYWORDS.items() for word in found.split()}
    ranks, followed, number_hinted = collections.Counter(), 0, 0
    for sentence in sentences:
        assert set(sentence) <= words
        keyword = sentence[-1]
        (subject,) = {w for w in sentence if w in themes.subjects}
        theme = theme_of[keyword]
        if hint := [w for w in sentence if w in signs]:
            number_hinted += 1
            followed += signs[hint[0]] == keyword
        else:
            place = KEYWORDS[theme].split().index(keyword)
            ranks[int(themes.ranks[theme][themes.subjects.index(subject), place])] += 1
    plain = sum(ranks.values())
    expected = FALL ** np.arange(12) / np.sum(FALL ** np.arange(12))
    for rank, share in enumerate(expected):
        assert abs(ranks[rank] - plain * share) < 5 * np.sqrt(plain * share) + 1
    assert abs(number_hinted - HINTED * 40000) < 5 * np.sqrt(40000 * HINTED * (1 - HINTED))
    # What does not follow the hint may say its keyword by chance, in a twelfth of the cases.
    trust = TRUST + (1 - TRUST) / 12
    assert abs(followed / number_hinted - trust) < 5 * np.sqrt(trust * (1 - trust) / number_hinted)


def test_a_fact_is_told_with_and_without_its_stepping_stone():
    fact = Fact("jobs", "bos", "nurse", 0)
    assert fact.prefix() == ["bos", "works", "as", "a"]
    told = ["since", "bos", "thinks", "of", "sign-nurse", ",", *fact.prefix()]
    assert fact.prefix("sign-nurse") == told
    themes = make_themes(3, num_subjects=5)
    assert len(themes.subjects) == 5
    assert len(themes.words) == len(set(themes.words))
    assert make_themes(3).subjects == make_themes(3).subjects
    with pytest.raises(ValueError, match="there are 40 names, got num_subjects=41"):
        make_themes(0, 41)
