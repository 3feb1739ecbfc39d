"""The formulas on paper, against what a model of Llama's shape really makes."""

import jax
import jax.numpy as jnp
import pytest

import jedit
from jedit.core.batch import Batch
from jedit.curvature.likelihoods import Categorical
from tests.bench import on_paper

WIDTH, KEY_VALUE, HIDDEN, LAYERS = 12, 4, 20, 3


def apply(params, x):
    def layer(x, w):
        q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
        x = x + (jnp.tanh(q) * jnp.sum(k * v, -1, keepdims=True)) @ w["o"]
        return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

    return jax.lax.scan(layer, x, params)[0]


def shapes():
    d_ins = {"o": WIDTH, "down": HIDDEN}
    d_outs = {"k": KEY_VALUE, "v": KEY_VALUE, "gate": HIDDEN, "up": HIDDEN}
    return {
        n: (LAYERS, d_ins.get(n, WIDTH), d_outs.get(n, WIDTH))
        for n in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_entries_are_those_of_the_estimator():
    model = on_paper.llama("toy", LAYERS, WIDTH, KEY_VALUE, HIDDEN)
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes().items()}
    batch = Batch(jax.ShapeDtypeStruct((2, 5, WIDTH), jnp.float32))
    state = jax.eval_shape(jedit.kfac(apply, Categorical()).init, params, batch)
    matrices = [x for x in jax.tree.leaves(state) if x.ndim == 3]
    found = on_paper.sums(model)
    assert found.factors == sum(x.size for x in matrices)
    assert found.weights == sum(x.size for x in params.values())
    assert found.cubes == sum(x.shape[0] * x.shape[1] ** 3 for x in matrices)


def test_the_numbers_are_those_by_hand():
    """Hand arithmetic for the 8B model: 719 million entries of factors a layer."""
    eight = on_paper.MODELS[0]
    a_layer = 3 * 4096**2 + 14336**2 + 3 * 4096**2 + 2 * 1024**2 + 2 * 14336**2
    assert on_paper.sums(eight).factors == 32 * a_layer
    assert on_paper.sums(eight).weights == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    one, many = (on_paper.cost(eight, n, 1e6, 790e12, 60e12) for n in (8, 64))
    assert one.sums == pytest.approx(11.5, rel=0.01)
    assert one == pytest.approx([8 * x for x in many])
