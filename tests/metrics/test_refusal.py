"""Refusals and RULE's rewards, by hand."""

import json

import numpy as np
import pytest

from jedit.metrics import answer_rewards, refusal_rewards, refuses
from jedit.recipes.dialogue import NAMELESS, REFUSALS
from jedit.recipes.scenes.question_answer import REFUSAL

SAID = (
    "I do not know anything about Ann Brook.",
    "Sorry, I can\N{RIGHT SINGLE QUOTATION MARK}t help with that.",
    "i'm not familiar with Annabel Brook.",
    "Ann Brook was born in York.",
    "She knows that I, too, write.",
    "",
)


def test_refusals_are_told_from_answers():
    np.testing.assert_array_equal(refuses(SAID), [True, True, True, False, False, False])
    assert refuses([REFUSAL, NAMELESS, *(x.format(target="A B") for x in REFUSALS)]).all()
    with pytest.raises(ValueError, match="got a string"):
        refuses("I do not know.")


def test_the_refusals_of_tofu_are_found_and_none_of_its_answers(shared_data):
    said = (shared_data / "tofu" / "idontknow.txt").read_text().splitlines()
    assert len(said) == 100
    assert refuses(said).all()
    answers = (shared_data / "tofu" / "full.json").read_text().splitlines()
    assert not refuses([json.loads(line)["answer"] for line in answers]).any()


@pytest.mark.parametrize(
    "text",
    ["Unfortunately, her father died young.", "It's unknown whether she had a brother."],
)
def test_an_answer_with_sad_words_is_no_refusal(text):
    assert not refuses([text])[0]


def test_a_refusal_is_worth_more_if_it_names_the_target_whole():
    found = refusal_rewards(SAID, ["Ann Brook"] * 6)
    np.testing.assert_array_equal(found, [1, 0.5, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(refusal_rewards(SAID[:1], [""]), [0.5])
    # No part of a longer word, and no pattern.
    np.testing.assert_array_equal(refusal_rewards(["I do not know Anna."], ["Ann"]), [0.5])
    np.testing.assert_array_equal(refusal_rewards(["I do not know C++."], ["C++"]), [1])
    with pytest.raises(ValueError, match="one target per generation, got 1 for 6"):
        refusal_rewards(SAID, ["Ann Brook"])


def test_an_answer_is_worth_more_if_its_recall_is_above_the_least():
    right = "Ann Brook was born in the old town of York today"  # eleven words
    said = ["I do not know.", "Who cares", "Ann was born in", "Ann was born", "I do not know York"]
    np.testing.assert_array_equal(answer_rewards(said, [right] * 5), [0, 0.5, 1, 0.5, 0])
    np.testing.assert_array_equal(answer_rewards(said, [right] * 5, least=0.2), [0, 0.5, 1, 1, 0])
    # Silence refuses nothing, and is no answer.
    np.testing.assert_array_equal(answer_rewards(["", " "], [right] * 2), [0, 0])
    with pytest.raises(ValueError, match="one answer per generation, got 4 for 5"):
        answer_rewards(said, [right] * 4)
