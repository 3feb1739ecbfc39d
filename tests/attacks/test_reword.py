"""Rows in other words."""

import pytest

from jedit.attacks import in_other_words, with_prefix
from jedit.data import QaRow

ROW = QaRow("Who?", "She.", paraphrased_question="Which person?", fields={"author": "x"}, line=3)


def test_only_the_question_changes():
    assert with_prefix([ROW], "Please:") == [ROW._replace(question="Please: Who?")]
    assert in_other_words([ROW]) == [ROW._replace(question="Which person?")]


def test_a_row_without_a_paraphrase_is_refused():
    with pytest.raises(ValueError, match="1 of 2 rows have no paraphrased_question"):
        in_other_words([ROW, QaRow("Who?", "She.")])
