"""D+ and D- in an audit: the metric's own numbers, which no rule judges by."""

import jax
import numpy as np
import pytest

from jedit import metrics
from jedit.data import QaRow
from jedit.recipes.audit import hiding
from jedit.recipes.audit.rows import encode
from jedit.recipes.audit.rules import TABLE
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.models import small_gpt

ROWS = [QaRow(f"Who is {name}?", f"{name} is a baker.") for name in ("Ana", "Bo", "Cy", "Di", "Ed")]


def test_what_is_measured_is_the_metrics():
    size = Model(width=8, layers=1, heads=2, vocab=300, max_len=40)
    start = small_gpt(ROWS, size, "float32", key=jax.random.key(0))
    asked = encode(start.model, "forget", ROWS, most=400, salt=bytes(32))
    models = {"base": start.params, "edited": jax.tree.map(lambda x: 1.5 * x, start.params)}
    found = {role: hiding.influence_of(start.model, p, asked) for role, p in models.items()}
    for role, params in models.items():
        expected = metrics.influence(start.model.apply, params, asked.answers)
        np.testing.assert_allclose(found[role].positive, expected.positive, rtol=1e-4)
    shift = metrics.influence_shift(found["base"], found["edited"])
    (erased, hidden), note = hiding.measures_of(found)
    assert set(erased.models) == set(hidden.models) == {"edited"}
    assert erased.models["edited"].value == pytest.approx(shift.erased.mean())
    assert hidden.models["edited"].value == pytest.approx(shift.hidden.mean())
    assert "no verdict" in note
    # By the identity that makes it none.
    before, after = (one.positive.sum(1) + one.negative.sum(1) for one in found.values())
    apart = (shift.erased - shift.hidden).mean()
    assert apart == pytest.approx(1 - after.mean() / before.mean())


def test_no_rule_judges_by_influence():
    assert not [rule.name for rule in TABLE if "influence" in rule.passed + rule.failed]


def test_where_there_is_no_room_nothing_else_is_lost(monkeypatch):
    size = Model(width=8, layers=1, heads=2, vocab=300, max_len=40)
    start = small_gpt(ROWS, size, "float32", key=jax.random.key(0))
    asked = encode(start.model, "forget", ROWS, most=400, salt=bytes(32))

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating")

    monkeypatch.setattr(metrics, "influence", full)
    found = {
        role: hiding.influence_of(start.model, start.params, asked) for role in ("base", "edited")
    }
    measures, note = hiding.measures_of(found)
    assert measures == []
    assert note.endswith("not measured: JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory.")
