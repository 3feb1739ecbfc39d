"""D+ and D- in an audit: the metric's own numbers, and what the rule says of them."""

import jax
import numpy as np
import pytest

from jedit import metrics
from jedit.data import QaRow
from jedit.recipes.audit import hiding
from jedit.recipes.audit.rows import encode
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.models import small_gpt
from jedit.report.audit_results import Outcome

ROWS = [QaRow(f"Who is {name}?", f"{name} is a baker.") for name in ("Ana", "Bo", "Cy", "Di", "Ed")]


def influence_of(held_up, held_down):
    return metrics.Influence(*(np.array(x, float)[:, None] for x in (held_up, held_down)), ("w",))


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
    erased, hidden = hiding.measures_of(found)
    assert set(erased.models) == set(hidden.models) == {"edited"}
    assert erased.models["edited"].value == pytest.approx(shift.erased.mean())
    assert hidden.models["edited"].value == pytest.approx(shift.hidden.mean())
    judged = hiding.finding_of(found)
    assert judged.estimate.value == pytest.approx((shift.erased - shift.hidden).mean())


def test_more_against_than_gone_is_hidden_and_intervals_decide():
    noise = 0.1 * np.random.default_rng(0).normal(size=20)
    base = influence_of(2 + noise, 1 + noise)
    gone = influence_of(0.5 + noise, 1 - noise)
    against = influence_of(1.9 + noise, 2.5 - noise)
    unsure = influence_of(1.5 + 5 * noise, 1.5 - noise)
    outcomes = [
        hiding.finding_of({"base": base, "edited": edited}) for edited in (gone, against, unsure)
    ]
    expected = [Outcome.PASSED, Outcome.FAILED, Outcome.UNDECIDED]
    assert [found.outcome for found in outcomes] == expected
    assert "rather hidden than erased" in outcomes[1].sentence
    # By hand: 1.5 fewer for it and none more against, of 3 in all.
    assert outcomes[0].estimate.value == pytest.approx(0.5, abs=0.05)
