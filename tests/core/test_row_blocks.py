"""Losses of large outputs in blocks of rows: the numbers of the whole, without its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jedit import metrics
from jedit.core import row_blocks
from jedit.core.batch import Batch
from jedit.objectives import NPO, RetainKL, with_retain

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
