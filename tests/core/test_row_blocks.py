"""Losses of large outputs in blocks of rows: the numbers of the whole, without its memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jedit import metrics
from jedit.core import row_blocks
from jedit.core.batch import Batch
from jedit.curvature import diagonal, ggn_vector_product, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.curvature.temperature import _traces
from jedit.geometry import RetainKl
from jedit.metrics.likelihood_attacks import _token_z
from jedit.metrics.open_unlearning import token_scores
from jedit.metrics.output_kl import _sum_kl
from jedit.objectives import CEU, NPO, UNDIAL, LogitMargin, RetainKL, with_retain

LENGTH, WIDTH, VOCAB = 6, 8, 300


def rows(number, seed):
    draw = np.random.default_rng(seed)
    mask = draw.random((number, LENGTH)) < 0.7
    return Batch(
        jnp.asarray(draw.normal(size=(number, LENGTH, WIDTH)), jnp.float32),
        jnp.asarray(np.where(mask, draw.integers(0, VOCAB, (number, LENGTH)), -100), jnp.int32),
        jnp.asarray(mask, jnp.float32),
    )


def matrix(seed):
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=(WIDTH, VOCAB)), jnp.float32)}


def model():
    """A function of its own for each bound, since JAX keeps what it has compiled."""
    return lambda params, x: jnp.tanh(x) @ params["w"]


def computed(apply, number):
    forget, retain, params, reference = rows(number, 0), rows(number, 1), matrix(2), matrix(3)
    objective = with_retain(NPO(beta=0.5), RetainKL())

    def loss(params):
        return objective(apply, params, forget, retain, reference)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return {
        "loss": value,
        "gradient": gradient["w"],
        "by row": metrics.answer_nll_per_row(apply, params, forget),
        "KL": metrics.output_kl(apply, reference, params, retain),
    }


def others(apply, number):
    """What else is made of logits: objectives, greedy metrics, attacks, what a step costs."""
    forget, retain, params, reference = rows(number, 0), rows(number, 1), matrix(2), matrix(3)
    move = {"w": 0.1 * reference["w"]}
    price = RetainKl(apply, params, retain, likelihood=Categorical(), kept_bytes=0)
    found = {"KL of a move": price(move), "its prediction": price.predicted(move)}
    found["product"] = jax.jit(
        lambda: ggn_vector_product(apply, params, retain, move, likelihood=Categorical())["w"]
    )()
    for objective in (UNDIAL(beta=2.0), CEU(), LogitMargin()):

        def loss(params, objective=objective):
            return objective(apply, params, forget, retain, reference)[0]

        found[str(objective)] = jax.jit(jax.grad(loss))(params)["w"]
    given = (apply, params, forget)
    found["greedy"] = metrics.exact_memorization(*given)
    found["hint"] = metrics.extraction_strength(*given)
    found["min-k"] = metrics.min_k_scores(*given)
    found["min-k++"] = metrics.min_k_plus_plus_scores(*given)
    for kind in ("confidence", "entropy", "modified_entropy"):
        found[kind] = metrics.membership_scores(*given, kind=kind)
    found |= token_scores(*given)._asdict()
    found["temperature"] = _traces(apply, params, forget, (1.0, 3.0))
    return found


@pytest.mark.parametrize("number", [6, 7])
def test_blocks_change_no_other_number(number, monkeypatch):
    want = others(model(), number)
    monkeypatch.setattr(row_blocks, "MOST_BYTES", 4 * LENGTH * VOCAB * 3 + 8)
    seen = []

    def counting(params, x):
        seen.append(x.shape[0])
        return model()(params, x)

    got = others(counting, number)
    assert min(seen) == {6: 3, 7: 1}[number]
    for name, value in want.items():
        assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("number", "at_a_time"), [(12, 4), (12, 5), (7, 3), (7, 0)])
def test_blocks_change_no_number(number, at_a_time, monkeypatch):
    want = computed(model(), number)
    monkeypatch.setattr(row_blocks, "MOST_BYTES", 4 * LENGTH * VOCAB * at_a_time + 8)
    shapes = []

    def seen(params, x):
        shapes.append(x.shape[0])
        return model()(params, x)

    got = computed(seen, number)
    # 5 of 12 rows at a time are blocks of 4, and 7 rows come one by one.
    assert min(shapes) == {(12, 4): 4, (12, 5): 4, (7, 3): 1, (7, 0): 1}[number, at_a_time]
    for name, value in want.items():
        assert_allclose(got[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_the_whole_is_never_there(monkeypatch):
    batch, params = rows(64, 0), matrix(2)

    def memory(apply):
        def loss(params):
            return NPO()(apply, params, batch, None, params)[0]

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    whole = 4 * 64 * LENGTH * VOCAB
    assert memory(model()) > whole
    monkeypatch.setattr(row_blocks, "MOST_BYTES", whole // 16)
    assert memory(model()) < 0.5 * whole


VOCABULARY = 151_936


def passes(params, batch, key):
    """What takes whole outputs anywhere, with the shapes that it is to be compiled for."""

    def apply(params, x):
        return jnp.tanh(x) @ params["w"]

    def loss(params, batch):
        return with_retain(NPO(), RetainKL())(apply, params, batch, batch, params)[0]

    def product(params, batch):
        return ggn_vector_product(apply, params, batch, params, likelihood=Categorical())

    found = {"gradient": (jax.grad(loss), params, batch), "product": (product, params, batch)}
    for make in (kfac, diagonal):
        estimator = make(apply, Categorical())
        state = jax.eval_shape(lambda p, b, e=estimator: e.init(p, b), params, batch)
        found[make.__name__] = estimator.update, state, params, batch, key
    scores = lambda p, b: (_token_z(apply, p, b), _sum_kl(apply, p, p, b))  # noqa: E731
    return found | {"scores": (scores, params, batch)}


@pytest.mark.parametrize("name", ["gradient", "product", "kfac", "diagonal", "scores"])
def test_a_vocabulary_of_152_thousand(name, key):
    """Of 2,048 tokens' logits, 1.2 GiB, never more than two blocks of 256 MiB are there."""
    shape = jax.ShapeDtypeStruct
    params = {"w": shape((WIDTH, VOCABULARY), jnp.float32)}
    lead = (64, 32)
    labels = shape(lead, jnp.int32)
    batch = Batch(shape((*lead, WIDTH), jnp.float32), labels, shape(lead, jnp.float32))
    function, *given = passes(params, batch, key)[name]
    memory = jax.jit(function).lower(*given).compile().memory_analysis().temp_size_in_bytes
    whole = 4 * math.prod(lead) * VOCABULARY
    assert whole / 4 > row_blocks.MOST_BYTES
    assert memory < 2.5 * row_blocks.MOST_BYTES
