"""TOFU end to end on a toy, and its question sets against the benchmark's definitions by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit import metrics
from jedit.core.batch import Batch
from jedit.data import QaRow, batches, read_tofu, train_tokenizer
from jedit.methods.row import Pace, Reach
from jedit.models import gpt, gpt_stepper
from jedit.recipes.comparison.task import Grid
from jedit.recipes.fitting import Recipe
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.depth import Three, depth_of
from jedit.recipes.tofu.evaluation import LanguageModel, encode_questions, generate, score_set
from jedit.recipes.tofu.membership import (
    GRADIENT_ROWS,
    Answers,
    encode_answers,
    membership_aucs,
    membership_scores,
    reference_of,
    spread,
)
from jedit.recipes.tofu.models import small_gpt
from jedit.recipes.tofu.presets import PRESETS, Preset
from jedit.recipes.tofu.run import invented_sets, read_sets, tofu
from jedit.recipes.tokenization import OwnWords
from jedit.report import verdict
from tests.conftest import ROOT

TOFU = ROOT.parent / "shared" / "data" / "tofu"
needs_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="needs ../shared/data/tofu")
TOY = Preset(
    authors=23,
    forgotten=2,
    questions=6,
    model=Model(width=16, layers=2, heads=2, vocab=400, max_len=160),
    recipe=Recipe(epochs=(1,), batch_size=32, learning_rate=1e-3),
    grid=Grid(
        budgets=(0.01,),
        temperatures=(1.0,),
        damping=(0.1,),
        kfade_steps=(1,),
        methods=("K-FADE (K-FAC)", "K-FADE (EK-FAC)", "engram", "NPO", "NPO (natural)", "AltPO"),
        rates=dict.fromkeys(Pace, (1e-3,)),
        looks=(2,),
        batch_size=8,
        kl_budget=1.0,
        scales={Reach.WHOLE: (0.5,)},
        utility_share=0.0,
    ),
)


@needs_tofu
def test_sets_are_disjoint_and_whole():
    sets = read_sets(TOFU, PRESETS["cpu"])
    assert [len(rows) for rows in sets] == [120, 48 * 20, 120, 100, 117, 120]
    parts = [{row.identity for row in rows} for rows in (sets.forget, sets.seen, sets.heldout)]
    assert all(not a & b for i, a in enumerate(parts) for b in parts[:i])
    assert all(row.perturbed_answer and row.paraphrased_answer for row in sets.heldout)
    for forgotten in (1, 10, 20):
        sets = read_sets(TOFU, PRESETS["gpu"]._replace(forgotten=forgotten))
        assert len(sets.forget) + len(sets.seen) + len(sets.heldout) == 4000
    with pytest.raises(ValueError, match="1 to 20 authors of at most 200 can be forgotten"):
        read_sets(TOFU, PRESETS["cpu"]._replace(forgotten=21))


def test_invented_sets_have_the_form_of_the_real_ones():
    preset = TOY._replace(authors=12, forgotten=2)
    sets = invented_sets(preset, seed=3, facts_per_author=4)
    assert [len(rows) // 4 for rows in sets] == [2, 8, 2, 2, 2, 2]
    authors = [{row.fields.get("author") for row in rows} for rows in sets]
    assert len(set().union(*authors)) == 18
    assert all(row.perturbed_answer for rows in sets for row in rows)
    for rows in (sets.forget, sets.heldout):
        assert all(row.paraphrased_answer for row in rows)
    for rows in (sets.real_authors, sets.world_facts):  # asked by choice, as TOFU's are
        assert not any(row.paraphrased_answer for row in rows)
    assert sets == invented_sets(preset, seed=3, facts_per_author=4)
    with pytest.raises(ValueError, match="5 have to be kept; got 8 of 12"):
        invented_sets(preset._replace(forgotten=8), seed=3)


@pytest.fixture(scope="module")
def model_and_params():
    tokenizer = train_tokenizer(["who is it that I know? it is he, she, they"], 280)
    apply, params = gpt(
        key=jax.random.key(0), vocab=280, width=8, num_layers=1, num_heads=2, max_len=64
    )
    stepper = gpt_stepper(num_layers=1, num_heads=2)
    words = OwnWords(tokenizer)
    return LanguageModel(apply, stepper, words, max_len=64, num_positions=64, chunk=2), params


ROWS = [
    QaRow("who?", "it is he", None, "he it is", ("she", "they are")),
    QaRow("who is it?", "she", None, "it is she", ("he", "I")),
    QaRow("they?", "they", None, "they, they", ("he", "it is she")),
]


def loss_by_hand(model, params, question, answer):
    """Mean loss of the tokens of " answer" and the end token, from one pass over one row."""
    tokenizer = model.words.tokenizer
    encode = tokenizer.encode
    prompt = encode(question).ids
    tokens = [*prompt, *encode(f" {answer}").ids, tokenizer.token_to_id("<eos>")]
    # Padded on the right, which changes nothing to its left: one shape compiles once.
    inputs = jnp.asarray([[*tokens[:-1], *[0] * (40 - len(tokens))]], jnp.int32)
    logits = np.asarray(jax.jit(model.apply)(params, inputs)[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = range(len(prompt) - 1, len(tokens) - 1)
    return -np.mean([log_p[i, tokens[i + 1]] for i in places])


@pytest.mark.parametrize("is_choice", [False, True])
def test_scores_by_hand(model_and_params, is_choice):
    model, params = model_and_params
    rows = [row._replace(paraphrased_answer=None) for row in ROWS] if is_choice else ROWS
    found = score_set(model, params, encode_questions(model, rows))
    for i, row in enumerate(rows):
        right = loss_by_hand(model, params, row.question, row.answer)
        wrong = [loss_by_hand(model, params, row.question, w) for w in row.perturbed_answer]
        said = (
            right
            if is_choice
            else loss_by_hand(model, params, row.question, row.paraphrased_answer)
        )
        chosen = np.exp(-right) / (np.exp(-right) + np.exp(-np.array(wrong)).sum())
        np.testing.assert_allclose(found.loss[i], right, rtol=1e-4)
        np.testing.assert_allclose(
            found.probability[i], chosen if is_choice else np.exp(-right), rtol=1e-4
        )
        np.testing.assert_allclose(found.truth_ratio[i], np.exp(said - np.mean(wrong)), rtol=1e-4)
    answers = [row.answer for row in rows]
    np.testing.assert_array_equal(found.rouge, metrics.rouge(answers, found.generations)[1])


def test_membership_by_hand(model_and_params):
    model, params = model_and_params
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [
        0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    # Of the two, the reference is the one that knows nothing.
    attacked = jax.tree.map(jnp.add, params, jax.tree.unflatten(tree, noise))
    unseen = [QaRow("they are?", "I that, they"), QaRow("I know?", "he is she")]
    known = Answers(ROWS, encode_questions(model, ROWS).answers)
    strangers = encode_answers(model, unseen)
    reference = reference_of(model, params, encode_questions(model, ROWS), strangers)
    found = membership_aucs(*membership_scores(model, attacked, known, strangers, reference))
    assert set(found) == {
        *("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradient_norm"),
    }

    @jax.jit
    def loss_of(params, rows):
        log_p = jax.nn.log_softmax(model.apply(params, rows.inputs))
        picked = jnp.take_along_axis(log_p, rows.targets[..., None], -1)[..., 0]
        return -jnp.sum(picked * rows.mask) / rows.mask.sum()

    gradient_of = jax.jit(jax.grad(loss_of))

    def encoded(row):
        return model.words.rows([(row.question, row.answer)], 40)

    def loss(params, row):
        return loss_of(params, encoded(row))

    def auc(score):
        ours, theirs = ([score(row) for row in rows] for rows in (ROWS, unseen))
        return np.mean([a < b for a in ours for b in theirs])

    def gradient_norm(row):
        leaves = jax.tree.leaves(gradient_of(attacked, encoded(row)))
        return np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in leaves))

    losses = {
        row.question: (float(loss(attacked, row)), float(loss(params, row)))
        for row in [*ROWS, *unseen]
    }
    assert found["loss"] == auc(lambda row: losses[row.question][0])
    assert found["reference"] == auc(lambda row: np.subtract(*losses[row.question]))
    assert found["gradient_norm"] == auc(gradient_norm)
    assert len({found["loss"], found["reference"], found["gradient_norm"]}) > 1
    itself = membership_aucs(*membership_scores(model, params, known, strangers, reference))
    assert itself["reference"] == 0.5


@pytest.mark.parametrize("num_rows", [3, 40, 41, 79, 120])
def test_gradients_are_taken_of_rows_all_over_the_set(num_rows):
    rows = Batch(np.arange(num_rows)[:, None], np.arange(num_rows)[:, None])
    asked = [QaRow("who?", str(i)) for i in range(num_rows)]
    rows, index = spread(Answers(asked, list(batches(rows, min(32, num_rows)))))
    taken = np.asarray(rows.inputs)[:, 0]
    np.testing.assert_array_equal(taken, index)
    assert len(taken) == len(set(taken)) == min(num_rows, GRADIENT_ROWS)
    assert taken[0] == 0
    assert taken[-1] >= num_rows - 1 - num_rows / len(taken)


def test_depth_by_the_small_gpts_own_sites():
    """Its head alone changed, a model has all its layers; all but its head, none of them."""
    begin = small_gpt(ROWS, TOY.model._replace(vocab=280), "float32", key=jax.random.key(2))
    assert len(begin.stream) == TOY.model.layers
    noise = lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)  # noqa: E731
    grown = jax.tree.map(noise, begin.params)
    # What it says itself, it knows.
    encoded = encode_answers(begin.model, ROWS)
    known = encoded._replace(
        encoded=[
            batch._replace(targets=jnp.argmax(begin.model.apply(grown, batch.inputs), axis=-1))
            for batch in encoded.encoded
        ]
    )
    three = Three(grown, grown | {"head": begin.params["head"]}, begin.params)
    found = depth_of(begin.model, three, known, begin.stream)
    assert found.aggregate == 0
    assert len(found.rows["score"]) == len(ROWS)
    three = three._replace(edited=begin.params | {"head": grown["head"]})
    assert depth_of(begin.model, three, known, begin.stream).aggregate == 1
    nothing = depth_of(begin.model, three._replace(retrained=grown), known, begin.stream)
    assert nothing.aggregate is None


def test_generation_stops_where_the_positions_end(model_and_params):
    model, params = model_and_params
    asked = encode_questions(model, ROWS)
    short = generate(model, params, asked.prompts, 3)
    long = generate(model, params, asked.prompts, 1000)
    assert len(short) == len(long) == 3


def test_questions_without_wrong_answers_are_refused(model_and_params):
    with pytest.raises(ValueError, match="needs wrong answers"):
        encode_questions(model_and_params[0], [ROWS[0]._replace(perturbed_answer=())])


@needs_tofu
@pytest.mark.reuses_keys
@pytest.mark.usefixtures("standard_promotion")
def test_a_toy_from_end_to_end(monkeypatch):
    def a_few(where, split):
        rows = read_tofu(where, split)
        if split.startswith(("real_authors", "world_facts", "holdout")):
            return rows[:8]
        return [row for i, row in enumerate(rows) if i % 20 < 4]

    monkeypatch.setattr("jedit.recipes.tofu.run.read_tofu", a_few)
    monkeypatch.setattr("jedit.recipes.tofu.run.HELDOUT_AUTHORS", range(18, 20))
    said = []
    (found,) = tofu(read_sets(TOFU, TOY), TOY, seed=0, say=said.append)
    methods = [method.name for method in found.methods]
    assert methods == list(TOY.grid.methods)
    assert list(found.leaderboard) == ["untouched", "retrained", *methods]
    retrained = found.leaderboard["retrained"]
    assert retrained["forget_quality"] == pytest.approx(1.0)
    assert retrained["privleak"] == 0
    assert retrained["privacy_score"] == 1
    depth = found.evaluations["NPO"]["jedit_depth_score"].rows["score"]
    assert len(depth) == found.num_rows["forget"]
    assert found.original.forget_quality == pytest.approx(
        found.leaderboard["untouched"]["forget_quality"]
    )
    asked = found.evaluations["NPO"]["retain_Q_A_Prob"].rows["prob"]
    assert len(asked) == found.num_rows["heldout"] > TOY.questions
    assert {m.name for m in found.methods if m.fit_seconds} == {*methods} - {"NPO", "AltPO"}
    columns = {name: set(row) for name, row in found.leaderboard.items()}
    assert columns.pop("retrained") == columns["untouched"] - {"reapplied"}
    assert len(set(map(frozenset, columns.values()))) == 1
    for name, row in found.leaderboard.items():
        assert all(np.isfinite(value) for value in row.values()), name
        assert 0 <= row["probe_accuracy"] <= 1
    assert "evaluating 8 models under attack" in said
    assert [answer.kind for answer in found.answers] == ["forget"] * 3 + ["retain"] * 3
    edited = found.chosen[0].method if found.chosen else "untouched"
    log = found.evaluations[edited]["forget_Q_A_ROUGE"].rows["generation"]
    assert found.answers[0].edited == log[0]
    assert found.num_judged.heldout == TOY.questions
    assert ("attacks" in verdict(found).sentence) is (found.chosen is not None)
