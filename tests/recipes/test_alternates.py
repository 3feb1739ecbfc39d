"""Alternate answers: drawn until they are wrong, in one shape, and paired as AltPO's code pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.data import Prompts, QaRow, prompts_of
from jedit.methods import CATALOGUE, Material
from jedit.models import Stepper, gpt, gpt_stepper, sampled_decode
from jedit.recipes.alternates import TEMPERATURES, sampled_alternates, sampled_tokens
from jedit.recipes.scenes.question_answer import ANSWER_TOKENS, Model, Sets, _Rows
from tests.objectives.references import (
    apply,
    make_batch,
    make_params,
    numpy_counted,
    numpy_mean_nll,
    numpy_nll,
)

ROWS = [QaRow("who?", "she"), QaRow("where?", "here"), QaRow("when?", "now")]


def test_an_alternate_is_the_first_that_is_wrong(key):
    said = {1.0: ["he", "", "now"], 1.5: ["it", "here", "now"], 2.0: ["x", "there", "now"]}
    asked = []

    def ask(key, temperature):
        asked.append((tuple(jax.random.key_data(key).tolist()), temperature))
        return said.get(temperature, ["", "", "now"])

    found = sampled_alternates(ROWS, ask, key=key)
    assert found == [("who?", "he"), ("where?", "there"), ("when?", "now")]
    assert [t for _, t in asked] == list(TEMPERATURES)
    assert len({k for k, _ in asked}) == len(TEMPERATURES)
    del asked[:]
    one = lambda *given: ask(*given)[:1]  # noqa: E731
    assert sampled_alternates(ROWS[:1], one, key=key) == found[:1]
    assert len(asked) == 1


def test_a_row_that_brings_an_alternate_is_not_asked(key):
    rows = [ROWS[0], ROWS[1]._replace(fields={"alternate_answer": "elsewhere"})]
    found = sampled_alternates(rows, lambda *_: ["he", "wrong"], key=key)
    assert found == [("who?", "he"), ("where?", "elsewhere")]
    given = [row._replace(fields={"alternate_answer": "x"}) for row in rows]

    def ask(*_):
        raise AssertionError("nothing is to be drawn")

    assert sampled_alternates(given, ask, key=key) == [("who?", "x"), ("where?", "x")]


def test_chunks_have_one_shape_and_draws_of_their_own(key):
    _, params = gpt(key=key, vocab=20, width=8, num_layers=1, num_heads=2, max_len=8)
    inner, sizes = gpt_stepper(num_layers=1, num_heads=2), set()

    def init(params, batch, num_positions):
        sizes.add(batch)
        return inner.init(params, batch, num_positions)

    stepper = Stepper(init, inner.step)
    prompts = Prompts(np.full((5, 3), 7, np.int32), np.array([3, 2, 3, 1, 3], np.int32))
    options = {"key": key, "temperature": 1.5}
    tokens = sampled_tokens(stepper, params, prompts, 6, chunk=2, **options)
    assert tokens.shape == (5, 6)
    assert sizes == {2}
    for start in (0, 2):
        chunk = slice(start, start + 2)
        drawn = sampled_decode(
            stepper,
            params,
            prompts.tokens[chunk],
            6,
            key=jax.random.fold_in(key, start),
            temperature=1.5,
            prompt_lengths=prompts.lengths[chunk],
        )
        np.testing.assert_array_equal(tokens[chunk], drawn)
    assert not np.array_equal(tokens[0], tokens[2]), "the same prompt, drawn alike"


def test_a_scenes_alternates_are_what_its_model_says_to_its_questions(key):
    model = Model(width=8, layers=1, heads=2, vocab=300, max_len=24)
    rows = _Rows(Sets(ROWS, ROWS[:2], ROWS[2:], ROWS[2:], ROWS[2:]), model)
    vocab = rows.tokenizer.get_vocab_size()
    _, params = model.make(vocab, rows.width + ANSWER_TOKENS, key=key)
    found = rows.alternates(ROWS[:2], model, params, key=key)
    forget = rows.encode(ROWS[:2])
    assert found.inputs.shape == forget.inputs.shape
    for given, original in zip(prompts_of(found), prompts_of(forget), strict=True):
        np.testing.assert_array_equal(given, original)
    assert np.any(np.asarray(found.targets) != np.asarray(forget.targets), axis=1).all()
    jax.tree.map(
        np.testing.assert_array_equal, found, rows.alternates(ROWS[:2], model, params, key=key)
    )


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_altpo_is_the_released_loss_of_each_answer_with_each_of_its_alternates(beta, tolerance):
    """-2/β logσ(β (log-ratio of alternate - answer)), sums over tokens, mean over pairs."""
    keys = jax.random.split(jax.random.key(3), 6)
    params, reference = make_params(keys[0]), make_params(keys[1])
    forget, *alternates, retain = map(make_batch, keys[2:])
    given = jax.tree.map(lambda *parts: jnp.concatenate(parts), *alternates)
    material = Material(apply, reference, forget, alternates=given)
    row = CATALOGUE["AltPO"]
    pairs = row.forget_rows(material)
    loss, _ = row.of(material, beta=beta).objective(apply, params, pairs, retain, reference)

    def log_ratio(batch):
        return -(numpy_nll(params, batch) - numpy_nll(reference, batch)).sum(axis=1)

    terms = [
        -2 / beta * np.log(1 / (1 + np.exp(-beta * (log_ratio(alternate) - log_ratio(forget)))))
        for alternate in alternates
    ]
    is_pair = [
        numpy_counted(forget).any(axis=1) & numpy_counted(alternate).any(axis=1)
        for alternate in alternates
    ]
    expected = np.concatenate(terms)[np.concatenate(is_pair)].mean()
    tolerance.check(loss, expected + numpy_mean_nll(params, retain))
    assert row.settings == {"beta": 0.1}
    material = Material(apply, reference, forget, alternates=jax.tree.map(lambda x: x[:-1], given))
    with pytest.raises(ValueError, match="are not as many for each of 5 forget rows"):
        row.forget_rows(material)


def test_an_answer_that_is_its_own_alternate_moves_nothing():
    params, reference = (make_params(k) for k in jax.random.split(jax.random.key(4)))
    forget = make_batch(jax.random.key(5))
    material = Material(apply, reference, forget, alternates=forget)
    row = CATALOGUE["AltPO"]
    objective, pairs = row.of(material).objective.objective, row.forget_rows(material)
    gradient = jax.grad(lambda p: objective(apply, p, pairs, None, reference)[0])(params)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, 0, atol=1e-6)
