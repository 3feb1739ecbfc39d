"""Sharpness-aware unlearning in the training loop, against the same steps written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.methods import sam
from jedit.objectives import GA, NPO, RetainKL, RetainNLL
from jedit.training import LoopState, unlearn


def apply(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def by_hand(loss, retained, params, steps, radius, alpha, is_trained=lambda _: True):
    """θ <- θ - 0.1 m, m <- 0.9 m + ∇L_f(θ + ρ g/‖g‖) + α ∇L_r(θ), on the trained leaves."""
    momentum = {name: 0.0 for name in params}
    for _ in range(steps):
        g = {n: x for n, x in jax.grad(loss)(params).items() if is_trained(n)}
        norm = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in g.values()))
        there = {n: x + radius * g[n] / norm if n in g else x for n, x in params.items()}
        outer, held = jax.grad(loss)(there), jax.grad(retained)(params)
        for n in g:
            momentum[n] = 0.9 * momentum[n] + outer[n] + alpha * held[n]
            params = {**params, n: params[n] - 0.1 * momentum[n]}
    return params


@pytest.mark.parametrize(
    ("radius", "alpha", "trainable"), [(0.3, 0.7, None), (0.05, 2.0, None), (0.3, 0.7, "v")]
)
def test_three_steps_are_the_ones_by_hand(scene, key, radius, alpha, trainable, tolerance):
    params, forget, retain = scene
    reference = jax.tree.map(lambda p: 0.8 * p, params)
    terms = {"objective": NPO(beta=0.5), "held": RetainKL(), "weight": alpha}
    method = sam(optax.sgd(0.1, momentum=0.9), radius=radius, **terms)
    start = LoopState(0, params, None, reference)
    method = method._replace(trainable=trainable)
    moved, history = unlearn(method, apply, start, forget, retain, steps=3, key=key)

    def loss(p):
        return NPO(beta=0.5)(apply, p, forget, None, reference)[0]

    def retained(p):
        return RetainKL()(apply, p, None, retain, reference)[0]

    is_trained = (lambda name: name == trainable) if trainable else (lambda _: True)
    expected = by_hand(loss, retained, params, 3, radius, alpha, is_trained)
    tolerance.check(moved, expected, "factorization")
    assert float(history["loss"][0]) == pytest.approx(
        float(loss(params) + alpha * retained(params)), rel=1e-5
    )


def test_the_default_ascends_the_forget_loss_from_where_it_is_lower(scene, key, tolerance):
    params, forget, retain = scene
    method = sam(optax.sgd(0.1), radius=0.2)
    moved, history = unlearn(method, apply, params, forget, retain, steps=1, key=key)
    ascent = lambda p: GA()(apply, p, forget)[0]  # noqa: E731
    held = lambda p: RetainNLL()(apply, p, None, retain)[0]  # noqa: E731
    g = jax.grad(ascent)(params)
    norm = jnp.sqrt(sum(jnp.sum(x * x) for x in g.values()))
    there = jax.tree.map(lambda p, x: p + 0.2 * x / norm, params, g)
    assert ascent(there) > ascent(params), "the perturbation undoes forgetting"
    expected = jax.tree.map(
        lambda p, x, y: p - 0.1 * (x + y), params, jax.grad(ascent)(there), jax.grad(held)(params)
    )
    tolerance.check(moved, expected)
    assert set(history) == {"forget_nll", "retain_nll", "loss"}


def test_a_vanishing_forget_gradient_perturbs_nothing(scene, key, tolerance):
    params, forget, retain = scene
    nothing = lambda apply, p, *_: (0.0 * jnp.sum(p["w"]), {})  # noqa: ARG005, E731
    method = sam(optax.sgd(0.1), radius=0.2, objective=nothing)
    moved, _ = unlearn(method, apply, params, forget, retain, steps=1, key=key)
    held = lambda p: RetainNLL()(apply, p, None, retain)[0]  # noqa: E731
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(held)(params))
    tolerance.check(moved, expected)


def test_mistakes_get_a_sentence():
    with pytest.raises(ValueError, match="radius must be positive"):
        sam(optax.sgd(0.1), radius=0.0)
