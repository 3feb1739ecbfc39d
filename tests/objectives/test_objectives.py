"""Objectives against their formulas in NumPy float64, on fixed arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit import objectives
from jedit.core.batch import Batch
from jedit.core.outputs import counted_outputs
from jedit.objectives import (
    GA,
    NPO,
    RetainKL,
    RetainNLL,
    SimNPO,
    sequence_nll,
    token_kl,
    with_retain,
)
from tests.objectives.references import (
    apply,
    make_batch,
    make_problem,
    numpy_counted,
    numpy_kl,
    numpy_mean_nll,
    numpy_npo,
)


@pytest.fixture
def problem():
    return make_problem()


def test_ga_is_minus_the_mean_nll(problem, tolerance):
    params, _, forget, retain = problem
    loss, aux = GA()(apply, params, forget, retain)
    expected = numpy_mean_nll(params, forget)
    tolerance.check(loss, -expected)
    tolerance.check(aux["forget_nll"], expected)


def test_retain_terms(problem, tolerance):
    params, reference, forget, retain = problem
    loss, aux = RetainNLL()(apply, params, forget, retain)
    tolerance.check(loss, numpy_mean_nll(params, retain))
    tolerance.check(aux["retain_nll"], loss)
    loss, aux = RetainKL()(apply, params, forget, retain, reference)
    tolerance.check(loss, numpy_kl(reference, params, retain))
    tolerance.check(aux["retain_kl"], loss)
    loss, gradient = jax.value_and_grad(lambda p: RetainKL()(apply, p, None, retain, reference)[0])(
        reference
    )
    np.testing.assert_allclose(loss, 0, atol=1e-7)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0, atol=1e-6), gradient)


@pytest.mark.parametrize("with_kl", [False, True])
def test_the_combinator_weighs_both_terms(problem, tolerance, with_kl):
    params, reference, forget, retain = problem
    term = RetainKL() if with_kl else RetainNLL()
    objective = with_retain(GA(), term, weight=2.5, forget_weight=0.7)
    loss, aux = objective(apply, params, forget, retain, reference if with_kl else None)
    held = numpy_kl(reference, params, retain) if with_kl else numpy_mean_nll(params, retain)
    tolerance.check(loss, -0.7 * numpy_mean_nll(params, forget) + 2.5 * held)
    assert set(aux) == {"forget_nll", "retain_kl" if with_kl else "retain_nll"}


def test_gradient_difference_is_the_default(problem, tolerance):
    params, _, forget, retain = problem
    loss, _ = with_retain(GA())(apply, params, forget, retain)
    tolerance.check(loss, numpy_mean_nll(params, retain) - numpy_mean_nll(params, forget))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_npo_is_its_formula(problem, tolerance, beta):
    params, reference, forget, retain = problem
    npo = NPO(beta)
    given = (apply, params, forget, retain, reference)
    expected = numpy_npo(reference, params, forget, beta)
    tolerance.check(npo(*given)[0], expected)
    loss, aux = with_retain(npo, weight=3.0)(*given)
    tolerance.check(loss, expected + 3.0 * numpy_mean_nll(params, retain))
    assert set(aux) == {"forget_nll", "forget_nll_growth", "retain_nll"}
    loss, _ = with_retain(npo, RetainKL(), weight=3.0)(*given)
    tolerance.check(loss, expected + 3.0 * numpy_kl(reference, params, retain))


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_npo_at_the_reference(problem, tolerance, beta):
    """The loss is (2/β) log 2, the gradient that of ascent on the summed loss."""
    params, _, forget, _ = problem
    npo = lambda p: NPO(beta)(apply, p, forget, None, params)[0]  # noqa: E731
    loss, gradient = jax.value_and_grad(npo)(params)
    tolerance.check(loss, np.asarray(2 / beta * np.log(2)))
    ascent = jax.grad(lambda p: GA()(apply, p, forget)[0])(params)
    counted = numpy_counted(forget)
    tokens_per_example = counted.sum() / counted.any(axis=1).sum()
    tolerance.check(gradient, jax.tree.map(lambda g: tokens_per_example * g, ascent))


def test_npo_is_finite_far_from_the_reference(problem):
    """Summed losses differ by more than float32's exponential can hold, in either direction."""
    params, _, forget, _ = problem
    far = {"embed": 60.0 * params["embed"], "out": 60.0 * params["out"]}
    for model, reference in ((params, far), (far, params)):
        value, gradient = jax.value_and_grad(
            lambda p, reference=reference: NPO(1.0)(apply, p, forget, None, reference)[0]
        )(model)
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_no_gradient_flows_into_the_reference(problem):
    params, reference, forget, retain = problem
    objective = with_retain(NPO(), RetainKL())
    gradient = jax.grad(lambda r: objective(apply, params, forget, retain, r)[0])(reference)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "objective",
    [GA(), with_retain(GA()), with_retain(NPO()), RetainNLL(), RetainKL()],
    ids=["ga", "graddiff", "npo", "retain_nll", "retain_kl"],
)
def test_padding_changes_neither_value_nor_gradient(problem, key, objective):
    params, reference, _, _ = problem
    run = jax.jit(
        jax.value_and_grad(lambda p, f, r: objective(apply, p, f, r, reference), has_aux=True)
    )
    clean, dirty = (
        run(params, *(make_batch(jax.random.clone(key), garbage=g) for g in garbage))
        for garbage in ((0, 0), (4, 6))
    )
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_equal_values_are_one_argument_of_the_compiler(problem):
    """Also deep inside a combination; another number is another program."""
    params, reference, forget, retain = problem
    traced = []

    def counting(params, inputs):
        traced.append(1)
        return apply(params, inputs)

    @jax.jit(static_argnums=0)
    def evaluate(objective, params):
        return objective(counting, params, forget, retain, reference)[0]

    make = lambda beta: with_retain(NPO(beta=beta), RetainKL(), weight=0.3)  # noqa: E731
    first = evaluate(make(0.5), params)
    once = len(traced)
    assert evaluate(make(0.5), params) == first
    assert len(traced) == once
    assert evaluate(make(0.6), params) != first
    assert len(traced) == 2 * once
    assert make(0.5) == make(0.5)
    assert hash(make(0.5)) == hash(make(0.5))
    assert make(0.5) != make(0.6)
    assert GA() != RetainNLL()
    with pytest.raises(dataclasses.FrozenInstanceError):
        NPO().beta = 0.2


def test_a_classifier_has_one_output_per_example(problem, tolerance):
    """The lead is (batch,): the same functions, a sequence being one output."""
    params, reference, _, _ = problem
    forget = Batch(jnp.array([0, 3, 5]), jnp.array([1, 1, 6]), mask=jnp.array([1, 0, 1]))
    logits = np.asarray(params["embed"] @ params["out"], np.float64)
    nll = -scipy.special.log_softmax(logits, axis=-1)[[0, 3, 5], [1, 1, 6]]
    loss, _ = GA()(apply, params, forget)
    tolerance.check(loss, -np.mean(nll[[0, 2]]))
    sums = sequence_nll(apply, params, forget)
    tolerance.check(sums, nll * np.array([1, 0, 1]))
    assert np.isfinite(NPO()(apply, params, forget, None, reference)[0])


def test_bfloat16_logits_are_summed_in_float32(problem):
    params, _, forget, _ = problem
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    (loss, _), gradient = jax.value_and_grad(lambda p: GA()(apply, p, forget), has_aux=True)(narrow)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}


def test_small_kl_keeps_its_digits_in_float32(key):
    k_z, k_d = jax.random.split(key)
    z = jax.random.normal(k_z, (20, 1000), jnp.float32)
    other = z + 3e-4 * jax.random.normal(k_d, z.shape, jnp.float32)
    z64, other64 = np.asarray(z, np.float64), np.asarray(other, np.float64)
    log_p, log_q = (scipy.special.log_softmax(x, axis=-1) for x in (z64, other64))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(token_kl(z, other), expected, rtol=5e-3)


def test_kl_with_excluded_classes():
    p, q = jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.0, 0.0, 0.0])
    np.testing.assert_allclose(token_kl(p, q), np.log(1.5), rtol=1e-6)
    assert token_kl(q, p) == jnp.inf


def test_bad_batches_get_a_sentence(problem):
    params, _, forget, retain = problem
    with pytest.raises(ValueError, match=r"batch\.targets has shape None"):
        GA()(apply, params, forget._replace(targets=None))
    with pytest.raises(ValueError, match=r"batch\.targets has shape \(5, 3\)"):
        GA()(apply, params, forget._replace(targets=forget.targets[:, :3]))
    with pytest.raises(ValueError, match=r"batch\.mask has shape \(5,\)"):
        counted_outputs(forget._replace(mask=jnp.ones(5)), (5, 4))


NEED_A_REFERENCE = [
    NPO(),
    RetainKL(),
    objectives.UNDIAL(),
    objectives.DPO(),
    objectives.RepresentationDeviation(lambda _, p, x: p["embed"][x]),
    objectives.RetainStates(lambda _, p, x: p["embed"][x]),
]


@pytest.mark.parametrize("objective", NEED_A_REFERENCE, ids=lambda x: type(x).__name__)
def test_a_missing_reference_gets_a_sentence(problem, objective):
    params, _, forget, retain = problem
    name = type(objective).__name__
    forget = (forget, retain) if name == "DPO" else forget
    with pytest.raises(ValueError, match=rf"{name} needs `reference`, .*; got None"):
        objective(apply, params, forget, retain)


@pytest.mark.usefixtures("unchecked_annotations")
def test_missing_retain_rows_and_wrong_numbers_get_a_sentence(problem):
    params, reference, forget, _ = problem
    for held in (RetainNLL(), RetainKL()):
        with pytest.raises(TypeError, match=r"retain must be a jedit\.Batch, got None"):
            with_retain(GA(), held)(apply, params, forget, None, reference)
    with pytest.raises(ValueError, match="beta must be positive"):
        NPO(beta=0.0)
    with pytest.raises(ValueError, match="gamma must not be negative"):
        SimNPO(gamma=-1.0)
    with pytest.raises(ValueError, match="weight must not be negative"):
        with_retain(GA(), weight=-1.0)
    with pytest.raises(TypeError, match="held must be a function"):
        with_retain(GA(), 0.5)
    with pytest.raises(TypeError, match="objective must be a function"):
        with_retain(GA)
