"""A forget that does nothing is refused, and what is not finite stops a method and is named."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jedit
from jedit import metrics
from jedit.core.batch import Batch
from jedit.curvature import diagonal, estimate, kfac
from jedit.curvature.likelihoods import Bernoulli, Categorical
from jedit.edits import Edit, apply_edit
from jedit.geometry import null_space, scale_to_kl_budget
from jedit.methods import (
    Ascent,
    Associations,
    Layers,
    Search,
    engram,
    kfade,
    memit,
    salun,
    target_values,
)
from jedit.objectives import GA, relabel, with_retain
from jedit.requests import Refresh, batch_unlearn
from jedit.training import TrainingMethod, Watch, fit, unlearn

CLASSES = 3
NAN = float("nan")


def network(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(0)

    def rows(n):
        x, y = rng.normal(size=(n, 4)), rng.integers(0, CLASSES, n)
        return Batch(jnp.asarray(x), jnp.asarray(y), jnp.ones(n), jnp.ones(n))

    params = {"w": jnp.asarray(rng.normal(size=(4, 5))), "v": jnp.asarray(rng.normal(size=(5, 3)))}
    forget, retain = rows(4), rows(8)
    curvature = estimate(kfac(network, Categorical()), params, [retain], key=jax.random.key(0))
    return params, forget, retain, curvature


def _kfade(params, forget, retain, curvature):
    return kfade(network, params, curvature, forget, retain, budget=1e-3, ascent=Ascent(1))


def _batch_unlearn(params, forget, retain, curvature):
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), retain._replace(inputs=retain.inputs))
    stack = jax.tree.map(lambda x, own: x[:, : len(own)].at[1].set(own), stack, forget)
    return batch_unlearn(network, params, curvature, stack)


def _unlearn(params, forget, retain, curvature):
    del curvature
    method = TrainingMethod(with_retain(GA()), SGD, batch_size=8)
    return unlearn(method, network, params, forget, retain, steps=2, key=jax.random.key(0))


def _salun(params, forget, retain, curvature):
    del retain, curvature
    return salun(network, params, forget, SGD)


SGD = optax.sgd(0.1)
METHODS = {"kfade": _kfade, "batch_unlearn": _batch_unlearn, "unlearn": _unlearn, "salun": _salun}


def nothing(batch, field):
    return batch._replace(**{field: jnp.zeros_like(getattr(batch, field))})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", ["mask", "valid"])
def test_a_forget_that_counts_nothing_is_refused(scene, method, field):
    params, forget, retain, curvature = scene
    with pytest.raises(ValueError, match=r"counts? no output|at least one row|must lead with"):
        METHODS[method](params, nothing(forget, field), retain, curvature)
    with pytest.raises(ValueError, match=r"counts? no output|at least 1"):
        METHODS[method](params, jax.tree.map(lambda x: x[:0], forget), retain, curvature)


def test_one_request_of_many_that_counts_nothing_is_named(scene):
    params, forget, _, curvature = scene
    requests = jax.tree.map(lambda x: jnp.stack([x, x, x]), forget)
    requests = requests._replace(mask=requests.mask.at[1].set(0))
    with pytest.raises(ValueError, match=r"requests \[1\] count no output"):
        batch_unlearn(network, params, curvature, requests, predicted_kl=0.1)


@pytest.mark.parametrize("make", [kfac, diagonal])
def test_a_curvature_of_no_outputs_is_refused(scene, make):
    params, forget, retain, curvature = scene
    for empty in (nothing(retain, "mask"), jax.tree.map(lambda x: x[:0], retain)):
        with pytest.raises(ValueError, match="the curvature is of no outputs"):
            estimate(make(network, Categorical()), params, [empty], key=jax.random.key(0))
    # A batch may be padding alone.
    estimate(
        make(network, Categorical()),
        params,
        [retain, nothing(retain, "valid")],
        key=jax.random.key(0),
    )
    none = dataclasses.replace(curvature, num_outputs=jnp.zeros((), jnp.int32))
    for use in (
        lambda: _kfade(params, forget, retain, none),
        lambda: _batch_unlearn(params, forget, retain, none),
        lambda: engram(params, none, curvature),
        lambda: engram(params, curvature, [curvature, none]),
        lambda: null_space(none, threshold=0.1),
    ):
        with pytest.raises(ValueError, match="is of no outputs"):
            use()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("field", "value"), [("mask", 0.5), ("mask", NAN), ("valid", 2.0)])
def test_a_mask_holds_zeros_and_ones(scene, method, field, value):
    params, forget, retain, curvature = scene
    wrong = forget._replace(**{field: getattr(forget, field).at[2].set(value)})
    match = rf"{field} must hold 0 and 1.* got {value} at \[.*2\]"
    with pytest.raises(ValueError, match=match):
        METHODS[method](params, wrong, retain, curvature)


@pytest.mark.parametrize("method", ["kfade", "batch_unlearn", "salun"])
@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_that_is_no_class_is_refused_where_it_counts(scene, method, label):
    params, forget, retain, curvature = scene
    wrong = forget._replace(targets=forget.targets.at[1].set(label))
    with pytest.raises(ValueError, match=rf"labels that count must be from 0 to 2; got {label} at"):
        METHODS[method](params, wrong, retain, curvature)
    METHODS[method](params, wrong._replace(mask=forget.mask.at[1].set(0)), retain, curvature)


def test_labels_are_looked_at_wherever_they_are_used(scene):
    params, forget, retain, _ = scene
    wrong = retain._replace(targets=retain.targets.at[3].set(-100))
    for make in (kfac, diagonal):
        estimate(
            make(network, Categorical()), params, [wrong], key=jax.random.key(0)
        )  # sampled: not used
        estimator = make(network, Categorical(), fisher="empirical")
        with pytest.raises(ValueError, match=r"batch 1: labels that count .* got -100 at \[3\]"):
            estimate(estimator, params, [wrong], key=jax.random.key(0))
    for use in (
        lambda: metrics.nll(network, params, wrong),
        lambda: metrics.accuracy(network, params, [retain, wrong]),
        lambda: metrics.min_k_scores(network, params, wrong),
        lambda: _unlearn(params, forget, wrong, None),
        lambda: relabel(wrong, CLASSES, key=jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match=r"labels that count .* got -100 at \[3\]"):
            use()
    answers = retain._replace(targets=jnp.full((8, 3), 1.5))
    estimator = kfac(network, Bernoulli(), fisher="empirical")
    with pytest.raises(ValueError, match="labels that count must be from 0 to 1; got 1.5"):
        estimate(estimator, params, [answers], key=jax.random.key(0))


CULPRITS = {
    "the parameters": r"the parameters \['w'\] are not finite",
    "forget": r"rows \[2\] of forget hold numbers that are not finite",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("culprit", CULPRITS)
def test_what_is_not_finite_stops_a_method_and_is_named(scene, method, culprit):
    params, forget, retain, curvature = scene
    if culprit == "forget":
        forget = forget._replace(inputs=forget.inputs.at[2, 1].set(NAN))
    else:
        params = params | {"w": params["w"].at[0, 0].set(NAN)}
    expected = CULPRITS[culprit] if method != "batch_unlearn" else r"requests \[(0, )?1\] are not"
    with pytest.raises(FloatingPointError, match=expected):
        METHODS[method](params, forget, retain, curvature)


def test_a_retain_row_that_is_not_finite_is_named(scene):
    params, forget, retain, curvature = scene
    wrong = retain._replace(inputs=retain.inputs.at[5, 0].set(NAN))
    with pytest.raises(FloatingPointError, match=r"retain KL is not finite.*rows \[5\] of retain"):
        _kfade(params, forget, wrong, curvature)


def test_the_step_at_which_a_loop_leaves_the_numbers_is_named(scene):
    forget = scene[1]

    def falls(params, rows):
        return -jnp.exp(jnp.sum(params["w"])) * jnp.mean(rows.inputs) ** 2, {}

    start, called = {"w": jnp.full((3,), 2.0)}, []
    run = partial(fit, falls, SGD, start, forget)
    _, history = run(epochs=1, key=jax.random.key(0))
    assert np.isfinite(history["loss"]).all()
    for watch in (None, Watch(lambda _, history: called.append(history), every=1)):
        with pytest.raises(FloatingPointError, match="the loss of step .* the steps before were t"):
            run(epochs=200, key=jax.random.key(0), watch=watch)
    assert called
    assert all(np.isfinite(history["loss"]).all() for history in called)

    def kinked(params, rows):  # a finite loss, whose gradient is not
        del rows
        return jnp.sqrt(jnp.sum(params["w"] ** 2)), {}

    with pytest.raises(FloatingPointError, match=r"step 0 left \['w'\] not finite"):
        fit(kinked, SGD, {"w": jnp.zeros(3)}, forget, epochs=1, key=jax.random.key(0))


def test_edits_and_values_that_are_not_finite_are_refused(scene):
    params, forget, retain, curvature = scene
    broken = params | {"v": params["v"].at[0, 0].set(NAN)}
    with pytest.raises(FloatingPointError, match=r"the edit is not finite at 'w'"):
        apply_edit(params, Edit({"w": params["w"] * NAN, "v": params["v"]}))
    with pytest.raises(FloatingPointError, match=r"the step is not finite at 'v'"):
        scale_to_kl_budget(network, params, broken, retain, budget=0.1, likelihood=Categorical())
    with pytest.raises(FloatingPointError, match=r"engram is not finite.*parameters \['v'\]"):
        engram(broken, curvature, curvature)
    facts = Associations(forget)
    with pytest.raises(FloatingPointError, match=r"edit of 'v' is not.*rows \[1\] of the"):
        memit(
            network, params, curvature, facts, jnp.ones((4, 3)).at[1].set(NAN), layers=Layers("v")
        )
    standard = jax.numpy_dtype_promotion("standard")
    with standard, pytest.raises(FloatingPointError, match=r"of facts .* parameters \['v'\]"):
        target_values(network, broken, facts, layer="v", search=Search(steps=1))
    none = Associations(jax.tree.map(lambda x: x[:0], forget))
    with pytest.raises(ValueError, match="no associations to write"):
        memit(network, params, curvature, none, jnp.ones((0, 3)), layers=Layers("v"))


def test_a_stream_does_not_take_nan_for_forgotten(scene):
    params, forget, retain, curvature = scene
    stream = jedit.continual(
        network,
        kfac(network, Categorical()),
        forget,
        enough=3.0,
        predicted_kl=0.1,
        key=jax.random.key(0),
        refresh=Refresh(chunk=4),
    )
    state = stream.init(params)._replace(params=jax.tree.map(lambda p: p * NAN, params))
    with pytest.raises(FloatingPointError, match=r"losses of rows \[0\].*the parameters \['v'"):
        stream.forget(state, [0])


def test_a_request_of_a_small_gradient_is_answered(scene):
    """Squares of its gradient are zero in float32; yet the edit is of the KL asked for."""
    params, forget, _, curvature = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, scene
    )
    requests = jax.tree.map(lambda x: x[None], forget)

    @jax.numpy_dtype_promotion("standard")
    def answered(factor):
        apply = partial(_times, jnp.float32(factor))
        return batch_unlearn(apply, params, curvature, requests, predicted_kl=0.1)

    (edit, info), (small, its_info) = answered(1e-3), answered(1e-22)
    for found in (info, its_info):
        assert float(found.predicted_kl[0]) == pytest.approx(0.1, rel=1e-4)
    ratio = float(its_info.gradient_norm[0]) / float(info.gradient_norm[0])
    assert ratio == pytest.approx(1e-19, rel=1e-2)
    for path, block in edit.blocks.items():
        np.testing.assert_allclose(small.blocks[path].dense(), block.dense(), atol=1e-2)


def _times(factor, params, x):
    return factor * network(params, x)


def test_rows_predicted_with_certainty_are_refused():
    """Their gradient is zero, and so would be the edit."""

    def linear(params, x):
        return x @ params["w"]

    params, rows = {"w": 2000 * jnp.eye(4)}, jnp.eye(4)
    sure = jedit.Batch(rows, jnp.arange(4))
    estimator = jedit.kfac(linear, jedit.likelihoods.Categorical(temperature=1000.0))
    curvature = jedit.estimate(estimator, params, [sure], key=jax.random.key(0))
    with pytest.raises(ValueError, match="the gradient of forget is zero in all"):
        jedit.methods.kfade(linear, params, curvature, sure, sure, budget=0.05)
    requests = jax.tree.map(lambda x: x[:, None], sure)
    with pytest.raises(ValueError, match=r"gradient of requests \[0, 1, 2, 3\] is zero"):
        jedit.batch_unlearn(linear, params, curvature, requests, predicted_kl=0.05)


@pytest.mark.parametrize("estimator", ["kfac", "diagonal", "ekfac"])
def test_every_estimator_looks_at_masks(estimator):
    def linear(params, x):
        return x @ params["w"]

    params, likelihood = {"w": jnp.eye(4)}, jedit.likelihoods.Categorical()
    batch = jedit.Batch(jnp.eye(4), jnp.arange(4))
    made = jedit.kfac(linear, likelihood)
    if estimator == "ekfac":
        curvature = jedit.estimate(made, params, batch, key=jax.random.key(0))
        made = jedit.ekfac(linear, likelihood, curvature)
    elif estimator == "diagonal":
        made = jedit.diagonal(linear, likelihood)
    half = batch._replace(mask=jnp.full(4, 0.5))
    with pytest.raises(ValueError, match="mask"):
        jedit.estimate(made, params, half, key=jax.random.key(0))
