"""GeRe in a NumPy loop: bands, margins, their mean; UER in NumPy: angles, inner products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit.core.batch import Batch
from jedit.models import gpt, mlp
from jedit.objectives import UER, GeRe, LearnNLL, RetainMargin, replayed_states, with_retain
from jedit.objectives.held import RetainNLL
from jedit.tracing import Cosines
from tests.objectives.references import (
    WIDTH,
    apply,
    make_problem,
    numpy_counted,
    numpy_logits,
    numpy_mean_nll,
)

SPREAD = 0.7


def hidden(apply, params, inputs):
    del apply
    return jnp.tanh(params["embed"][inputs])


def numpy_states(params, batch):
    return np.tanh(np.asarray(params["embed"], np.float64)[np.asarray(batch.inputs)])


@pytest.fixture
def problem():
    return make_problem()


def numpy_margin(params, reference, rows, spread):
    """Entry by entry."""
    before, now = numpy_states(reference, rows), numpy_states(params, rows)
    valid = np.asarray(rows.valid).astype(bool)
    low = before[valid].mean(axis=0) - spread * before[valid].std(axis=0)
    high = before[valid].mean(axis=0) + spread * before[valid].std(axis=0)
    found, kinds = [], set()
    for row, position in zip(*np.nonzero(valid), strict=True):
        for j in range(WIDTH):
            h0, h = before[row, position, j], now[row, position, j]
            if h0 <= low[j]:
                margin, kind = max(h - low[j], 0), "low"
            elif h0 >= high[j]:
                margin, kind = max(high[j] - h, 0), "high"
            else:
                margin, kind = max(h - high[j], 0) + max(low[j] - h, 0), "between"
            if margin > 0:
                found.append(margin)
                kinds.add(kind)
    return np.mean(found), kinds


@pytest.mark.parametrize("chunk", [32, 2])
def test_the_margin_is_the_loops(problem, chunk, tolerance):
    params, reference, _, retain = problem
    expected, kinds = numpy_margin(params, reference, retain, SPREAD)
    assert kinds == {"low", "between", "high"}  # each of the three formulas is at work
    replayed = replayed_states(hidden, apply, reference, retain, spread=SPREAD, chunk=chunk)
    assert replayed.bands.dtype == jnp.int8
    loss, aux = RetainMargin(hidden)(apply, params, None, replayed)
    tolerance.check(loss, expected)
    tolerance.check(aux, {"margin": expected})


def test_chunks_that_count_nothing_are_no_states(problem, tolerance):
    """Four rows of padding in front, in chunks of two: two chunks count nothing."""
    _, reference, _, retain = problem
    padded = jax.tree.map(lambda x: jnp.concatenate([jnp.zeros_like(x[:4]), x]), retain)
    found = replayed_states(hidden, apply, reference, padded, spread=SPREAD, chunk=2)
    expected = replayed_states(hidden, apply, reference, retain, spread=SPREAD)
    tolerance.check(found.low[0], expected.low[0])
    tolerance.check(found.high[0], expected.high[0])


def test_an_untouched_model_has_no_margin_and_no_gradient(problem):
    _, reference, _, retain = problem
    replayed = replayed_states(hidden, apply, reference, retain)
    loss = lambda p: RetainMargin(hidden)(apply, p, None, replayed)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(reference)
    assert value == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_the_whole_loss_is_both_nlls_and_the_margin(problem, tolerance):
    params, reference, forget, retain = problem
    replayed = replayed_states(hidden, apply, reference, retain, spread=SPREAD)
    margin, _ = numpy_margin(params, reference, retain, SPREAD)
    new, old = numpy_mean_nll(params, forget), numpy_mean_nll(params, retain)
    loss, aux = GeRe(hidden, weight=3.0)(apply, params, forget, replayed)
    tolerance.check(loss, (new + old) / 2 + 3 * margin)
    tolerance.check(aux, {"new_nll": new, "replayed_nll": old, "margin": margin})


def test_one_row_by_itself_has_the_margin_that_it_has_among_others(problem, tolerance):
    """The thresholds are those of all rows, and go with each."""
    params, reference, _, retain = problem
    replayed = replayed_states(hidden, apply, reference, retain, spread=SPREAD)
    one = jax.tree.map(lambda x: x[1:3], replayed)
    loss, _ = RetainMargin(hidden)(apply, params, None, one)
    states = jnp.tanh(params["embed"][one.rows.inputs])
    low, high = one.low[:, None], one.high[:, None]
    margin = np.where(
        one.bands < 0,
        np.maximum(states - low, 0),
        np.where(
            one.bands > 0,
            np.maximum(high - states, 0),
            np.maximum(states - high, 0) + np.maximum(low - states, 0),
        ),
    )[np.asarray(one.rows.valid).astype(bool)]
    tolerance.check(loss, margin[margin > 0].mean())


@pytest.mark.usefixtures("unchecked_annotations")
def test_other_states_than_were_noted_get_a_sentence(problem):
    params, reference, _, retain = problem
    with pytest.raises(TypeError, match="retain must be a ReplayedStates, rows that"):
        GeRe(hidden)(apply, params, retain, retain)
    replayed = replayed_states(hidden, apply, reference, retain)
    wider = lambda _, p, x: jnp.concatenate([p["embed"][x]] * 2, axis=-1)  # noqa: E731
    with pytest.raises(ValueError, match="take the same `hidden` for both"):
        RetainMargin(wider)(apply, params, None, replayed)


def numpy_cosines(states, matrix):
    lengths = np.linalg.norm(states, axis=-1, keepdims=True) * np.linalg.norm(matrix, axis=0)
    return (states @ matrix) / lengths


@pytest.mark.parametrize("scale", [2.5, 30.0])
def test_uer_is_an_angle_for_new_rows_and_the_inner_product_for_old_ones(problem, scale, tolerance):
    params, _, forget, retain = problem
    embed, out = (np.asarray(params[name], np.float64) for name in ("embed", "out"))
    logits = scale * numpy_cosines(embed[np.asarray(forget.inputs)], out)
    log_p = scipy.special.log_softmax(logits, axis=-1)
    counted = numpy_counted(forget)
    targets = np.where(counted, forget.targets, 0)
    new = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0][counted].mean()
    old = numpy_mean_nll(params, retain)
    assert abs(new - numpy_mean_nll(params, forget)) > 0.1  # the two are told apart
    objective = UER(Cosines("out"), scale=scale, weight=0.3)
    loss, aux = objective(apply, params, forget, retain)
    tolerance.check(loss, new + 0.3 * old)
    tolerance.check(aux, {"new_nll": new, "replayed_nll": old})


def test_new_rows_do_not_lengthen_a_class_and_old_rows_do(problem, tolerance):
    """The gradient of a cosine is orthogonal to what it is the cosine of."""
    params, _, forget, retain = problem
    objective = UER(Cosines("out"), weight=0.0)
    gradient = jax.grad(lambda p: objective(apply, p, forget, retain)[0])(params)
    along = np.sum(gradient["out"] * params["out"], axis=0)
    np.testing.assert_allclose(along, 0, atol=tolerance.contraction)
    assert np.abs(gradient["out"]).max() > 1e-3
    gradient = jax.grad(lambda p: RetainNLL()(apply, p, None, retain)[0])(params)
    assert np.abs(np.sum(gradient["out"] * params["out"], axis=0)).max() > 1e-3


def test_cosines_of_models_with_a_bias_of_their_own_layout_and_of_no_length(key, tolerance):
    make, draw = jax.random.split(key)
    mlp_apply, params = mlp(key=make, sizes=(5, 4, 3), dtype=jnp.result_type(float))
    params["layers"]["1"]["bias"] = jnp.array([0.5, -2.0, 1.0])
    x = jax.random.normal(draw, (6, 5)).at[0].set(0.0)
    first, second = (np.asarray(params["layers"][i]["kernel"], np.float64) for i in "01")
    states = np.maximum(np.asarray(x, np.float64) @ first, 0)
    cosines = Cosines("layers/1/kernel")(mlp_apply, params, x)
    np.testing.assert_array_equal(cosines[0], 0)  # nothing enters there
    is_there = np.linalg.norm(states, axis=-1) > 0
    tolerance.check(cosines[is_there], numpy_cosines(states[is_there], second))
    # A weight (d_out, d_in), as Equinox has it.
    turned = lambda p, x: jnp.einsum("bi,oi->bo", jnp.tanh(x), p["w"])  # noqa: E731
    w = jnp.asarray(second.T)
    inputs = jnp.asarray(states[is_there])
    found = Cosines("w")(turned, {"w": w}, inputs)
    tolerance.check(found, numpy_cosines(np.tanh(states[is_there]), second))


def test_cosines_of_a_language_models_head_and_none_of_what_is_no_head(key):
    model, params = gpt(key=key, vocab=11, width=8, num_layers=1, num_heads=2, max_len=6)
    tokens = jnp.arange(12).reshape(2, 6) % 11
    cosines = Cosines("head/kernel")(model, params, tokens)
    logits = model(params, tokens)
    assert cosines.shape == logits.shape
    assert np.all(np.abs(cosines) <= 1 + 1e-6)
    np.testing.assert_array_equal(np.sign(cosines), np.sign(logits))
    with pytest.raises(ValueError, match="is no head: it must be one dense matrix"):
        Cosines("embed/embedding")(model, params, tokens)
    with pytest.raises(ValueError, match="'head/kernel#1' is no site; those of this parameter"):
        Cosines("head/kernel#1")(model, params, tokens)


def test_a_margin_is_a_retain_term_of_any_objective(problem, tolerance):
    params, reference, forget, retain = problem
    replayed = replayed_states(hidden, apply, reference, retain, spread=SPREAD)
    margin, _ = numpy_margin(params, reference, retain, SPREAD)
    loss, _ = with_retain(LearnNLL(), RetainMargin(hidden), weight=2.0)(
        apply, params, forget, replayed
    )
    tolerance.check(loss, numpy_mean_nll(params, forget) + 2 * margin)


def test_narrow_weights_and_a_classifier(problem):
    """Bfloat16 in, sums in float32; one output for each example."""
    params, reference, _, _ = problem
    rows = Batch(jnp.array([0, 3, 5]), jnp.array([1, 1, 6]))
    narrow, before = (
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), p) for p in (params, reference)
    )
    replayed = replayed_states(hidden, apply, before, rows)
    for objective, held in ((GeRe(hidden), replayed), (UER(Cosines("out")), rows)):
        loss = lambda p, o=objective, h=held: o(apply, p, rows, h)  # noqa: E731
        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(narrow)
        assert value.dtype == jnp.float32
        assert {x.dtype for x in aux.values()} == {jnp.dtype(jnp.float32)}
        assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}
    assert numpy_logits(params, rows._replace(mask=None)).shape == (3, 7)
