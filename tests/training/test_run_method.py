"""Any method by one function: what it returns, and that methods are exchanged as values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jedit
from jedit import Edit, run_method
from jedit.core.batch import Batch
from jedit.curvature.likelihoods import Categorical
from jedit.methods import Ascent, gu, kfade, rosu, sam
from jedit.objectives import GA, NPO, RetainKL, SimNPO, with_retain
from jedit.training import TrainingInfo, TrainingMethod, Watch, unlearn

SGD = optax.sgd(0.05)


def apply(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 5))), "v": jnp.asarray(rng.normal(size=(5, 3)))}
    forget, retain = (
        Batch(jnp.asarray(rng.normal(size=(n, 4))), jnp.asarray(rng.integers(0, 3, n)))
        for n in (6, 12)
    )
    return params, forget, retain


@pytest.fixture(scope="module")
def curvature(scene):
    estimator = jedit.kfac(apply, Categorical())
    return jedit.estimate(estimator, scene[0], [scene[2]], key=jax.random.key(0))


@pytest.mark.usefixtures("standard_promotion")
def test_methods_are_exchanged_by_one_value(scene, curvature):
    """Each raises the forget loss, and its edit is what turns the params into the new ones."""
    params, forget, retain = scene
    trained = {
        "NPO": TrainingMethod(with_retain(NPO(), RetainKL()), SGD),
        "SimNPO": TrainingMethod(with_retain(SimNPO(), forget_weight=4.0), SGD, trainable="w"),
        "SAM": sam(SGD),
        "GU": gu(GA(), learning_rate=0.02),
        "ROSU": rosu(SGD, radius=0.2, outer="push"),
    }
    closed = {
        "K-FADE": functools.partial(kfade, curvature=curvature, budget=0.05),
        "plain ascent": lambda apply, params, forget, retain: (  # noqa: ARG005 - as anyone's own
            Edit(jax.grad(lambda p: -0.1 * GA()(apply, p, forget)[0])(params)),
            None,
        ),
    }
    run = {"steps": 8, "key": jax.random.key(1)}
    before = jedit.metrics.nll(apply, params, forget)
    for name, method in {**trained, **closed}.items():
        options = run if isinstance(method, TrainingMethod) else {}
        edit, info = run_method(method, apply, params, forget, retain, **options)
        assert isinstance(edit, Edit), name
        assert isinstance(info, TrainingInfo) == (name in trained)
        after = jedit.apply_edit(params, edit)
        assert jedit.metrics.nll(apply, after, forget) > before + 1e-3, name
        if name in closed:
            continue
        expected, history = unlearn(method, apply, params, forget, retain, **run)
        for leaf, value, start in zip(
            *map(jax.tree.leaves, (after, expected, params)), strict=True
        ):
            # The difference that is an edit is rounded once, and once more when it is added.
            last_place = np.spacing(np.maximum(np.abs(value), np.abs(start)))
            assert np.all(np.abs(leaf - value) <= last_place), name
        jax.tree.map(np.testing.assert_array_equal, info.history, history)
        assert set(edit.blocks) == ({"w"} if name == "SimNPO" else {"w", "v"})


def test_a_closed_form_is_called_with_its_own_arguments_alone(scene, curvature):
    params, forget, retain = scene
    ascent = Ascent(2)
    method = functools.partial(kfade, curvature=curvature, budget=0.05, ascent=ascent)
    edit, info = run_method(method, apply, params, forget, retain)
    expected, expected_info = kfade(
        apply, params, curvature, forget, retain, budget=0.05, ascent=ascent
    )
    jax.tree.map(np.testing.assert_array_equal, edit, expected)
    np.testing.assert_array_equal(info.true_kl, expected_info.true_kl)


def test_the_loop_of_a_method_that_trains_can_be_watched(scene):
    params, forget, retain = scene
    seen = []
    watch = Watch(lambda state, _: seen.append(state.step), every=2)
    method = TrainingMethod(GA(), SGD)
    key = jax.random.key(0)
    run_method(method, apply, params, forget, retain, steps=4, key=key, watch=watch)
    assert seen == [2, 4]


@pytest.mark.usefixtures("unchecked_annotations")
def test_mistakes_get_a_sentence(scene):
    params, forget, retain = scene
    run = functools.partial(run_method, apply=apply, params=params, forget=forget, retain=retain)
    method = TrainingMethod(GA(), SGD)
    for given in ({}, {"steps": 3}, {"key": jax.random.key(0)}):
        with pytest.raises(ValueError, match="a TrainingMethod needs steps= and key="):
            run(method, **given)
    closed = lambda *_, **__: None  # noqa: E731
    with pytest.raises(ValueError, match="steps, key would not be looked at: .* closed form"):
        run(closed, steps=3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="watch would not be looked at"):
        run(closed, watch=Watch())
    with pytest.raises(TypeError, match="method must be a function"):
        run("engram")
