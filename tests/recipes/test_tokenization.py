"""Spans of an answer that a template has stripped."""

from jedit.data.text import marked_tokens
from jedit.recipes.tokenization import _moved


def test_spans_of_what_is_left_of_an_answer():
    # " Paris " without its spaces: its characters are one further to the left.
    assert _moved([(1, 6)], 1, 5) == [(0, 5)]
    assert _moved([(0, 3), (4, 7)], 1, 5) == [(0, 2), (3, 5)]
    assert _moved([], 1, 5) == []
    # A span of the space alone marks nothing, where none would mark the whole answer.
    assert marked_tokens([(0, 3), (3, 8)], _moved([(0, 1)], 1, 5), 3) == []
    assert marked_tokens([(0, 3), (3, 8)], _moved([(1, 2)], 1, 5), 3) == [1]
