"""Objectives against their formulas in NumPy float64, on fixed arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit import objectives
from jedit.core.batch import Batch
from jedit.core.outputs import counted_outputs
from tests.objectives.references import (
    apply,
    make_batch,
    make_problem,
    numpy_counted,
    numpy_kl,
    numpy_mean_nll,
    numpy_nll,
    numpy_npo,
)


@pytest.fixture
def problem():
    return make_problem()


def test_ga_is_minus_the_mean_nll(problem, tolerance):
    params, _, forget, retain = problem
    loss, aux = objectives.ga(params, forget, retain, apply=apply)
    expected = numpy_mean_nll(params, forget)
    tolerance.check(loss, -expected)
    tolerance.check(aux["forget_nll"], expected)


def test_retain_terms(problem, tolerance):
    params, reference, forget, retain = problem
    loss, aux = objectives.retain_nll(params, forget, retain, apply=apply)
    tolerance.check(loss, numpy_mean_nll(params, retain))
    tolerance.check(aux["retain_nll"], loss)
    retain_kl = partial(objectives.retain_kl, apply=apply, reference_params=reference)
    loss, aux = retain_kl(params, forget, retain)
    tolerance.check(loss, numpy_kl(reference, params, retain))
    tolerance.check(aux["retain_kl"], loss)
    loss, gradient = jax.value_and_grad(lambda p: retain_kl(p, None, retain)[0])(reference)
    np.testing.assert_allclose(loss, 0, atol=1e-7)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0, atol=1e-6), gradient)


@pytest.mark.parametrize("with_kl", [False, True])
def test_graddiff_weighs_both_terms(problem, tolerance, with_kl):
    params, reference, forget, retain = problem
    loss, aux = objectives.graddiff(
        params,
        forget,
        retain,
        apply=apply,
        gamma=0.7,
        alpha=2.5,
        retain_objective=objectives.retain_kl if with_kl else objectives.retain_nll,
        reference_params=reference if with_kl else None,
    )
    held = numpy_kl(reference, params, retain) if with_kl else numpy_mean_nll(params, retain)
    tolerance.check(loss, -0.7 * numpy_mean_nll(params, forget) + 2.5 * held)
    assert set(aux) == {"forget_nll", "retain_kl" if with_kl else "retain_nll"}


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_npo_is_its_formula(problem, tolerance, beta):
    params, reference, forget, retain = problem
    npo = partial(objectives.npo, apply=apply, reference_params=reference, beta=beta)
    expected = numpy_npo(reference, params, forget, beta)
    tolerance.check(npo(params, forget)[0], expected)
    loss, aux = npo(params, forget, retain, alpha=3.0)
    tolerance.check(loss, expected + 3.0 * numpy_mean_nll(params, retain))
    assert set(aux) == {"forget_nll", "forget_nll_growth", "retain_nll"}
    loss, _ = npo(params, forget, retain, alpha=3.0, retain_objective=objectives.retain_kl)
    tolerance.check(loss, expected + 3.0 * numpy_kl(reference, params, retain))


def test_npo_from_precomputed_losses_is_the_same(problem, tolerance):
    params, reference, forget, retain = problem
    expected = objectives.npo(
        params, forget, retain, apply=apply, reference_params=reference, beta=0.7, alpha=1.4
    )
    reference_nll = objectives.sequence_nll(apply, reference, forget)
    tolerance.check(reference_nll, numpy_nll(reference, forget).sum(1))
    actual = objectives.npo_from_nll(
        params, forget, retain, apply=apply, reference_nll=reference_nll, beta=0.7, alpha=1.4
    )
    tolerance.check(actual, expected, "rounding")


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_npo_at_the_reference(problem, tolerance, beta):
    """The loss is (2/β) log 2, the gradient that of ascent on the summed loss."""
    params, _, forget, _ = problem
    npo = partial(objectives.npo, apply=apply, reference_params=params, beta=beta)
    loss, gradient = jax.value_and_grad(lambda p: npo(p, forget)[0])(params)
    tolerance.check(loss, np.asarray(2 / beta * np.log(2)))
    ascent = jax.grad(lambda p: objectives.ga(p, forget, apply=apply)[0])(params)
    counted = numpy_counted(forget)
    tokens_per_example = counted.sum() / counted.any(axis=1).sum()
    tolerance.check(gradient, jax.tree.map(lambda g: tokens_per_example * g, ascent))


def test_npo_is_finite_far_from_the_reference(problem):
    """Summed losses differ by more than float32's exponential can hold, in either direction."""
    params, _, forget, _ = problem
    far = {"embed": 60.0 * params["embed"], "out": 60.0 * params["out"]}
    run = partial(objectives.npo, apply=apply, beta=1.0)
    for model, reference in ((params, far), (far, params)):
        value, gradient = jax.value_and_grad(
            lambda p, reference=reference: run(p, forget, reference_params=reference)[0]
        )(model)
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_no_gradient_flows_into_the_reference(problem):
    params, reference, forget, retain = problem
    gradient = jax.grad(
        lambda r: objectives.npo(
            params,
            forget,
            retain,
            apply=apply,
            reference_params=r,
            retain_objective=objectives.retain_kl,
        )[0]
    )(reference)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


def all_losses(reference):
    return {
        "ga": partial(objectives.ga, apply=apply),
        "graddiff": partial(objectives.graddiff, apply=apply),
        "npo": partial(objectives.npo, apply=apply, reference_params=reference),
        "retain_nll": partial(objectives.retain_nll, apply=apply),
        "retain_kl": partial(objectives.retain_kl, apply=apply, reference_params=reference),
    }


@pytest.mark.parametrize("name", ["ga", "graddiff", "npo", "retain_nll", "retain_kl"])
def test_padding_changes_neither_value_nor_gradient(problem, key, name):
    params, reference, _, _ = problem
    objective = all_losses(reference)[name]
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    clean, dirty = (
        run(params, *(make_batch(jax.random.clone(key), garbage=g) for g in garbage))
        for garbage in ((0, 0), (4, 6))
    )
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_a_classifier_has_one_output_per_example(problem, tolerance):
    """The lead is (batch,): the same functions, a sequence being one output."""
    params, reference, _, _ = problem
    forget = Batch(jnp.array([0, 3, 5]), jnp.array([1, 1, 6]), mask=jnp.array([1, 0, 1]))
    logits = np.asarray(params["embed"] @ params["out"], np.float64)
    nll = -scipy.special.log_softmax(logits, axis=-1)[[0, 3, 5], [1, 1, 6]]
    loss, _ = objectives.ga(params, forget, apply=apply)
    tolerance.check(loss, -np.mean(nll[[0, 2]]))
    sums = objectives.sequence_nll(apply, params, forget)
    tolerance.check(sums, nll * np.array([1, 0, 1]))
    assert np.isfinite(objectives.npo(params, forget, apply=apply, reference_params=reference)[0])


def test_bfloat16_logits_are_summed_in_float32(problem):
    params, _, forget, _ = problem
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    (loss, _), gradient = jax.value_and_grad(
        lambda p: objectives.ga(p, forget, apply=apply), has_aux=True
    )(narrow)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}


def test_small_kl_keeps_its_digits_in_float32(key):
    k_z, k_d = jax.random.split(key)
    z = jax.random.normal(k_z, (20, 1000), jnp.float32)
    other = z + 3e-4 * jax.random.normal(k_d, z.shape, jnp.float32)
    z64, other64 = np.asarray(z, np.float64), np.asarray(other, np.float64)
    log_p, log_q = (scipy.special.log_softmax(x, axis=-1) for x in (z64, other64))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(objectives.token_kl(z, other), expected, rtol=5e-3)


def test_kl_with_excluded_classes():
    p, q = jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.0, 0.0, 0.0])
    np.testing.assert_allclose(objectives.token_kl(p, q), np.log(1.5), rtol=1e-6)
    assert objectives.token_kl(q, p) == jnp.inf


def test_bad_batches_get_a_sentence(problem):
    params, _, forget, retain = problem
    with pytest.raises(ValueError, match=r"batch\.targets has shape None"):
        objectives.ga(params, forget._replace(targets=None), apply=apply)
    with pytest.raises(ValueError, match=r"batch\.targets has shape \(5, 3\)"):
        objectives.ga(params, forget._replace(targets=forget.targets[:, :3]), apply=apply)
    with pytest.raises(ValueError, match=r"batch\.mask has shape \(5,\)"):
        counted_outputs(forget._replace(mask=jnp.ones(5)), (5, 4))
    with pytest.raises(ValueError, match="reference_params"):
        objectives.graddiff(
            params, forget, retain, apply=apply, retain_objective=objectives.retain_kl
        )
