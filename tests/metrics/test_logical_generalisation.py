"""How far an edit carries: counted by hand on a table of answers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.data.invented.families import Fact, fact_rows, make_families, rewrite
from jedit.metrics import logical_scores


def apply(table, inputs):
    """Logits of a table of answers, one for every row (who, relation)."""
    logits = table[inputs[:, 0], inputs[:, 1]]
    return jnp.stack([jnp.zeros_like(logits), logits], axis=1)


def table_of(families, facts):
    vocab = len(families.words)
    table = np.zeros((vocab, 16, vocab))
    for s, r, o in facts:
        table[s, r] = 0
        table[s, r, o] = 1
    return jnp.asarray(table)


@pytest.fixture(scope="module")
def case():
    families = make_families(0, 3)
    old = Fact(families.token("Christine", 0), 0, families.token("Andrew", 0))
    return families, rewrite(families, old, families.token("Colin", 1))


def scores(families, found, facts, reference=None):
    kinds = {"reverse": found.reverse, "onto": found.onto_new, "of": found.of_others}
    return logical_scores(
        apply,
        table_of(families, facts),
        fact_rows([found.new]),
        {kind: fact_rows(rows) for kind, rows in kinds.items()},
        fact_rows(found.unrelated),
        reference=reference,
    )


def test_a_fact_written_by_itself_succeeds_and_carries_nowhere(case):
    families, found = case
    score = scores(families, found, [*families.facts, found.new])
    assert score.success == 1
    assert score.generalisation == 0
    assert score.locality == 1
    assert score.by_kind == {"reverse": 0, "onto": 0, "of": 0}


def test_each_kind_is_counted_by_itself(case):
    families, found = case
    facts = [*families.facts, *found.reverse, *found.of_others[:1]]
    score = scores(families, found, facts)
    assert score.success == 0
    assert score.by_kind == {"reverse": 1, "onto": 0, "of": 0.5}
    assert score.generalisation == pytest.approx(2 / 5)


def test_locality_is_of_what_was_said_before(case):
    families, found = case
    unrelated = found.unrelated
    assert len(unrelated) > 10
    before = [*unrelated[5:]]  # the first five were never known
    after = [*unrelated[7:]]  # and two more are lost
    reference = table_of(families, before)
    score = scores(families, found, after, reference)
    assert score.locality == pytest.approx(1 - 2 / (len(unrelated) - 5))
    assert scores(families, found, after).locality == pytest.approx(1 - 7 / len(unrelated))


def test_an_answer_is_its_whole(case):
    """Of an answer of two tokens one is right: that is no answer."""
    families, found = case
    rows = fact_rows([found.new])
    whole = rows._replace(mask=jnp.ones((1, 2), jnp.int32))
    first = int(found.new.relation)  # the target of the first position

    def both(table, inputs):
        logits = apply(table, inputs)
        return logits.at[:, 0, first].set(table[0, 0, 0] + 1)

    def score(facts):
        table = table_of(families, facts)
        return logical_scores(both, table, whole, {}, whole).success

    assert score([found.new]) == 1
    assert score([found.old]) == 0


def test_there_must_be_a_fact(case):
    families, found = case
    empty = Batch(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="no output of the edited facts counts"):
        logical_scores(apply, table_of(families, [found.new]), empty, {}, empty)
    score = logical_scores(apply, table_of(families, []), fact_rows([found.new]), {}, empty)
    assert np.isnan(score.generalisation)
    assert np.isnan(score.locality)
