"""KUDA's steps written out with a dense projector, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.methods import Corruption, Restoration, causal_trace, kuda
from jedit.models import gpt
from jedit.objectives import RepresentationDeviation, with_retain
from jedit.tracing import Entering
from jedit.training import unlearn

D_IN, D_HIDDEN = 7, 5


def hidden(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


def states(apply, params, x):
    del apply
    return hidden(params, x)


DEVIATION = with_retain(RepresentationDeviation(states, seed=3))


def apply(params, x):
    return hidden(params, x) @ params["v"]


@pytest.fixture
def scene(key):
    """Retained inputs in four of seven dimensions, and the curvature there."""
    rng = np.random.default_rng(0)
    shapes = {"w": (D_IN, D_HIDDEN), "b": (D_HIDDEN,), "v": (D_HIDDEN, 3)}
    params = {name: jnp.asarray(0.5 * rng.normal(size=shape)) for name, shape in shapes.items()}
    inputs = rng.normal(size=(6, D_IN)), rng.normal(size=(30, 4)) @ rng.normal(size=(4, D_IN))
    forget, retain = (
        Batch(jnp.asarray(x), jnp.asarray(rng.integers(0, 3, len(x)))) for x in inputs
    )
    curvature = estimate(kfac(apply, Categorical()), params, [retain], key=key)
    return params, forget, retain, curvature


def run(method, scene, key, steps):
    return unlearn(method, apply, *scene[:3], steps=steps, key=key)


def matrix(tree):
    return np.concatenate([np.asarray(tree["w"], np.float64), np.asarray(tree["b"])[None]])


@pytest.mark.parametrize(("threshold", "relaxation"), [(0.1, 0.7), (0.3, 0.0)])
def test_three_steps_are_the_ones_by_hand(scene, key, threshold, relaxation, tolerance):
    params, forget, retain, curvature = scene
    deviation = RepresentationDeviation(states, seed=3, tilt=0.5)
    objective = with_retain(deviation, weight=0.3, forget_weight=2.0)
    projection = {"threshold": threshold, "relaxation": relaxation}
    optimizer = optax.sgd(0.2, momentum=0.9)
    method = kuda(curvature, objective, optimizer, select="^w$", **projection)
    moved, history = run(method, scene, key, 3)

    x = np.concatenate([np.asarray(retain.inputs, np.float64), np.ones((30, 1))], axis=1)
    a, basis = np.linalg.eigh(x.T @ x / 30)
    is_free = np.cumsum(a) <= threshold * a.sum()
    weights = np.where(is_free, 1.0, 0.0)
    if relaxation:
        cut = a[is_free].max()
        weights = np.where(is_free, 1.0, (cut / np.where(is_free, 1, a)) ** (1 / relaxation))
    projector = (basis * weights) @ basis.T
    here, momentum = params, 0.0
    for _ in range(3):
        gradient = jax.grad(lambda p: objective(apply, p, forget, retain, params)[0])(here)
        momentum = 0.9 * momentum + matrix(gradient)
        new = matrix(here) - 0.2 * projector @ momentum
        here = {**here, "w": jnp.asarray(new[:-1]), "b": jnp.asarray(new[-1])}
    np.testing.assert_allclose(matrix(moved), matrix(here), atol=100 * tolerance.factorization)
    np.testing.assert_array_equal(moved["v"], params["v"])
    assert np.abs(matrix(moved) - matrix(params)).max() > 1e-2
    assert set(history) == {"forget_cosine", "retain_nll", "loss"}


@pytest.mark.usefixtures("standard_promotion")
def test_forget_states_turn_away_and_retained_inputs_see_nothing(scene, key, tolerance):
    params, forget, retain, curvature = scene
    optimizer = optax.adamw(0.02, weight_decay=0.1)
    settings = {"select": ["^w$"], "threshold": 1e-6, "relaxation": 0.0}
    method = kuda(curvature, DEVIATION, optimizer, **settings)
    moved, history = run(method, scene, key, 100)
    assert history["forget_cosine"][0] > 0.9
    assert history["forget_cosine"][-1] < 0.5
    before, after = (hidden(p, retain.inputs) for p in (params, moved))
    np.testing.assert_allclose(after, before, atol=100 * tolerance.factorization)
    assert np.abs(hidden(moved, forget.inputs) - hidden(params, forget.inputs)).max() > 0.3


def test_on_a_transformer_the_traced_layer_alone_moves(key):
    """The hidden state is what enters the next block, read off by name."""
    keys = jax.random.split(key, 5)
    model, params = gpt(key=keys[0], vocab=9, width=8, num_layers=2, num_heads=2, max_len=6)
    tokens = jax.random.randint(keys[1], (8, 6), 0, 9)
    forget, retain = Batch(tokens[:3], tokens[:3]), Batch(tokens[3:], tokens[3:])
    layers = [f"blocks/{i}/mlp/down/kernel" for i in range(2)]
    subject = jnp.zeros((3, 6), bool).at[:, 1].set(True)
    options = {
        "corruption": Corruption("embed/embedding", subject, samples=2),
        "restoration": Restoration(layers, window=1),
    }
    trace = causal_trace(model, params, forget, **options, key=keys[2])
    found = int(jnp.argmax(jnp.mean(trace.indirect_effect, axis=1)))

    curvature = estimate(kfac(model, Categorical(), select="mlp"), params, [retain], key=keys[3])
    objective = with_retain(RepresentationDeviation(Entering("head/kernel")))
    options = {"select": rf"blocks/{found}/mlp/", "threshold": 0.1}
    method = kuda(curvature, objective, optax.sgd(0.5), **options)
    moved, _ = unlearn(method, model, params, forget, retain, steps=2, key=keys[4])
    has_moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), moved, params)
    mlp = has_moved["blocks"][str(found)].pop("mlp")
    assert all(jax.tree.leaves(mlp))
    assert not any(jax.tree.leaves(has_moved))


def test_mistakes_get_a_sentence(scene):
    curvature = scene[3]
    with pytest.raises(ValueError, match=r"matches no parameter of the curvature; it covers w, v"):
        kuda(curvature, DEVIATION, optax.sgd(0.1), select="blocks/9")
    with pytest.raises(ValueError, match="threshold must be from 0 to 1, got 2"):
        kuda(curvature, DEVIATION, optax.sgd(0.1), select="w", threshold=2.0)
