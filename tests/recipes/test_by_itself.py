"""What is said of an edited folder, by its numbers alone."""

import re

from jedit.recipes.by_itself import cautions, how_it_went

FOUND = {
    "stopped": "unseen",
    "steps": 12,
    "is_done": [True, False],
    "p_value": [0.001, 0.2],
    "after": {"heldout_kl": 0.05},
    "rounded_away": 0.01,
    "num_rows": {"unseen": 9},
}


def test_nothing_is_said_of_what_went_well():
    assert not cautions(FOUND, 0.05)
    assert not cautions(FOUND | {"after": {"heldout_kl": 9.0}}, None)


def test_what_the_numbers_warn_of():
    (text,) = cautions(FOUND | {"steps": 0}, None)
    assert text.startswith("The model never knew these rows")
    assert not cautions(FOUND | {"steps": 0, "stopped": "budget"}, None)
    (text,) = cautions(FOUND, 0.02)
    assert re.search(r"moved by 0.050 nats, more than the budget of 0.020", text)
    (text,) = cautions(FOUND | {"rounded_away": 0.4}, None)
    assert "loses 40% of its change" in text
    told = {"ledger": {"edits_before": 1, "rows_left_out": 3}}
    (text,) = cautions(FOUND | told, None)
    assert text.startswith("3 rows to keep are what earlier edits of the ledger forgot")
    by_kfade = {"after": {"heldout_kl": 0.01}, "rounded_away": 0.0, "num_rows": {"forget": 2}}
    (text,) = cautions(by_kfade, 0.05)
    assert text.startswith("Without --unseen rows it was not tested")


def test_how_it_went():
    text = how_it_went(FOUND)
    assert text.startswith("12 steps in all: the rows cannot be told from unseen ones. 1 of 2 rows")
    assert "taught again" not in text
    back = how_it_went(FOUND | {"p_value": [0.001, 0.03]})
    assert "cannot be told" not in back
    assert "before the recovery, in which some fell back. 1 of 2 rows" in back
    comeback = {"before": (0.1, 0.05, 0.2), "after": (0.5, 0.4, 0.6), "unseen": (0.01, 0, 0.1)}
    text = how_it_went(FOUND | {"comeback": comeback})
    assert "0.100 [0.050, 0.200] and 0.500 [0.400, 0.600]; of unseen rows 0.010." in text


def test_how_a_closed_form_went():
    assert how_it_went({"true_kl": 0.1}) == ""
    assert how_it_went({"scale": 1.0, "p_value": [0.01, 0.3]}).endswith("p = 0.300.")
    assert how_it_went({"scale": 0.25}) == "0.250 of the whole edit is within the budget."
