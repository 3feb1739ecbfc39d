"""The relearning curve: every point is the best of `relearn`'s, called one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.attacks import Attacker, relearn, relearning_curve
from jedit.core.batch import Batch
from jedit.metrics import answer_nll_per_row
from jedit.models import with_lora

D, CLASSES, N = 5, 3, 13
RATES = (0.5, 30.0)
# The same optimizer for the same rate, so that what is compiled for one is found again.
SGD = functools.cache(optax.sgd)
ATTACKER = Attacker(SGD, rates=RATES, looks=(1, 5), shares=(0.0, 1 / 12, 1 / 3), batch_size=4)


def apply(params, x):
    return jnp.tanh(x @ params["v"]) @ params["w"]


def known(params, rows):
    return float(np.mean(np.exp(-answer_nll_per_row(apply, params, rows))))


@pytest.fixture
def scene():
    """Two models and rows that one rule labels, so that a few of them teach the others."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(N, D))
    rows = Batch(
        jnp.asarray(inputs), jnp.asarray(np.argmax(inputs[:, :CLASSES], axis=1), jnp.int32)
    )
    shapes = {"v": (D, 6), "w": (6, CLASSES)}
    models = [{k: jnp.asarray(rng.normal(size=v)) for k, v in shapes.items()} for _ in range(2)]
    return models, rows


def by_hand(params, rows, key, attacker=ATTACKER, model=apply, measure=known):
    """Values (taught, rates, steps) of one model, a call of `relearn` each."""
    order_key, teach_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(order_key, N))
    asked = jax.tree.map(lambda x: x[order[4:]], rows)  # a third of 13 is taught, 9 never are
    return np.array(
        [
            [
                relearn(
                    model,
                    params,
                    jax.tree.map(lambda x, count=count: x[order[:count]], rows),
                    optimizer=attacker.optimizer(rate),
                    looks=attacker.looks,
                    measure=lambda params: measure(params, asked),
                    key=teach_key,
                    batch_size=attacker.batch_size,
                ).values
                for rate in attacker.rates
            ]
            for count in (1, 4)
        ]
    )


@pytest.mark.reuses_keys
def test_every_point_is_the_best_of_its_attacks(scene, key, tolerance):
    (edited, retrained), rows = scene
    curve = relearning_curve(
        apply, edited, retrained, rows, attacker=ATTACKER, measure=known, key=key
    )
    np.testing.assert_array_equal(curve.taught, [1, 4])  # of 13; the first two shares are one row
    np.testing.assert_array_equal(curve.steps, [0, 1, 5])
    np.testing.assert_allclose(curve.shares, np.array([1, 4]) / N)
    chosen = set()
    for params, values, rates in (
        (edited, curve.edited, curve.edited_rates),
        (retrained, curve.retrained, curve.retrained_rates),
    ):
        expected = by_hand(params, rows, key)
        tolerance.check(values, expected.max(axis=1))
        np.testing.assert_array_equal(rates[:, 1:], np.array(RATES)[expected.argmax(axis=1)][:, 1:])
        assert np.isnan(rates[:, 0]).all()
        chosen |= set(rates[:, 1:].ravel())
    assert len(chosen) > 1  # what is best depends on the point
    np.testing.assert_array_equal(curve.excess, curve.edited - curve.retrained)


def test_the_same_model_has_no_excess_and_one_that_never_forgot_has_it_at_once(scene, key):
    (edited, retrained), rows = scene
    run = lambda edited, key: relearning_curve(  # noqa: E731
        apply, edited, retrained, rows, attacker=ATTACKER, measure=known, key=key
    )
    keys = jax.random.split(key)
    np.testing.assert_array_equal(run(retrained, keys[0]).excess, 0)
    gradient = jax.grad(lambda p: jnp.sum(_loss(p, rows)))
    learn = lambda _, p: jax.tree.map(lambda x, g: x - 0.05 * g, p, gradient(p))  # noqa: E731
    knowing = jax.lax.fori_loop(0, 200, learn, edited)
    curve = run(knowing, keys[1])
    assert (curve.excess[:, 0] > 0.3).all()
    assert (curve.edited[:, 0] > 0.8).all()


def _loss(params, rows):
    log_p = jax.nn.log_softmax(apply(params, rows.inputs), axis=-1)
    return -jnp.take_along_axis(log_p, rows.targets[:, None], axis=-1)


@pytest.mark.reuses_keys
def test_through_adapters(scene, key, tolerance):
    """The adapters alone are trained, on top of either model."""
    (edited, retrained), rows = scene
    adapted = with_lora(apply, edited, rows.inputs, rank=2, key=jax.random.key(5))
    only_lora = optax.multi_transform(
        {"lora": optax.sgd(0.5), "base": optax.set_to_zero()}, {"lora": "lora", "base": "base"}
    )
    attacker = ATTACKER._replace(optimizer=lambda _: only_lora, rates=(0.5,))
    measure = lambda params, rows: known(adapted.merge(params), rows)  # noqa: E731
    other = adapted.params | {"base": retrained}
    curve = relearning_curve(
        adapted.apply,
        adapted.params,
        other,
        rows,
        attacker=attacker,
        measure=lambda params, asked: float(
            np.mean(np.exp(-answer_nll_per_row(adapted.apply, params, asked)))
        ),
        key=key,
    )
    for params, values in ((adapted.params, curve.edited), (other, curve.retrained)):
        expected = by_hand(params, rows, key, attacker, adapted.apply, measure)
        tolerance.check(values, expected[:, 0])
        assert (values[:, 1:] != values[:, :1]).all()
    end = relearn(
        adapted.apply,
        other,
        rows,
        optimizer=only_lora,
        looks=(1,),
        measure=lambda _: None,
        key=key,
    ).params
    for name, leaf in retrained.items():
        np.testing.assert_array_equal(end["base"][name], leaf)


def test_what_diverges_is_not_chosen(scene, key):
    (edited, retrained), rows = scene
    attacker = ATTACKER._replace(shares=(1 / 3,), rates=(1e30, 0.1), looks=(1, 5))

    def diverging(params, asked):
        value = known(params, asked)
        return value if abs(params["w"]).max() < 1e6 else float("nan")

    curve = relearning_curve(
        apply, edited, retrained, rows, attacker=attacker, measure=diverging, key=key
    )
    assert (curve.edited_rates[:, 1:] == 0.1).all()
    assert np.isfinite(curve.edited).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": (0.5, 0.99)}, "leave none to be asked about"),
        ({"shares": (1.5,)}, "shares must be above 0"),
        ({"shares": ()}, "needs rates and shares"),
        ({"rates": ()}, "needs rates and shares"),
        ({"rates": (0.0,)}, "rates must be positive"),
        ({"looks": (2, 1)}, "looks must be rising"),
    ],
)
def test_refusals(scene, key, changes, message):
    (edited, retrained), rows = scene
    with pytest.raises(ValueError, match=message):
        relearning_curve(
            apply,
            edited,
            retrained,
            rows,
            attacker=ATTACKER._replace(**changes),
            measure=known,
            key=key,
        )
