"""PDU: its margin in NumPy, its dual variable by hand, and its steps written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.methods import CATALOGUE, pdu
from jedit.objectives import LogitMargin, RetainNLL, with_retain
from jedit.training import TrainingMethod, unlearn
from jedit.transforms import add_constraint_gradient
from tests.objectives.references import apply, make_problem, numpy_counted, numpy_logits


@pytest.fixture(autouse=True)
def _standard_promotion():
    """What optax's optimizers mix, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_margin_is_the_released_one_where_outputs_count(tolerance):
    params, _, forget, _ = make_problem()
    logits, counted = numpy_logits(params, forget), numpy_counted(forget)
    margin = (logits.max(axis=-1) - logits.mean(axis=-1))[counted]
    loss, aux = LogitMargin()(apply, params, forget)
    tolerance.check(loss, (margin**2).mean())
    tolerance.check(aux["forget_margin"], margin.mean())
    flat = jax.tree.map(jnp.zeros_like, params)
    assert float(LogitMargin()(apply, flat, forget._replace(targets=None))[0]) == 0


def model(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def rows(seed, n=6):
    rng = np.random.default_rng(seed)
    return Batch(jnp.asarray(rng.normal(size=(n, 4))), jnp.asarray(rng.integers(0, 3, n)))


@pytest.mark.parametrize(
    ("tolerance_", "dual", "dual_rate", "delay"), [(0.2, 3.0, 0.7, 2), (9.0, 1.0, 0.09, 0)]
)
def test_four_steps_are_the_ones_by_hand(tolerance_, dual, dual_rate, delay, key, tolerance):
    """Momentum m <- 0.9 m + ∇L_f + λ ∇L_r, and λ step by step; in the second case it falls to 0."""
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(4, 5))), "v": jnp.asarray(rng.normal(size=(5, 3)))}
    forget, retain = rows(2), rows(3)
    options = {"dual": dual, "dual_rate": dual_rate, "delay": delay}
    method = pdu(optax.sgd(0.02, momentum=0.9), tolerance=tolerance_, **options)
    moved, history = unlearn(method, model, params, forget, retain, steps=4, key=key)

    def margin(p):
        z = model(p, forget.inputs)
        return jnp.mean((jnp.max(z, axis=1) - jnp.sum(z, axis=1) / 3) ** 2)

    def nll(p):
        z = model(p, retain.inputs)
        picked = z[np.arange(6), np.asarray(retain.targets)]
        return jnp.mean(jnp.log(jnp.sum(jnp.exp(z), axis=1)) - picked)

    momentum, here, duals, losses = jax.tree.map(jnp.zeros_like, params), params, [dual], []
    for t in range(4):
        losses.append(float(margin(here)))
        gradients = zip(*map(jax.tree.leaves, (jax.grad(margin)(here), jax.grad(nll)(here))))  # noqa: B905
        total = [f + duals[-1] * r for f, r in gradients]
        total = jax.tree.unflatten(jax.tree.structure(params), total)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, total)
        broken = float(nll(here)) - tolerance_
        here = jax.tree.map(lambda p, m: p - 0.02 * m, here, momentum)
        duals.append(duals[-1] if t < delay else max(0.0, duals[-1] + dual_rate * broken))
    assert duals[-1] != dual
    assert (min(duals) == 0) == (tolerance_ == 9.0)
    tolerance.check(moved, here, "factorization")
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)


def test_a_constant_dual_is_a_retain_loss_of_that_weight(key, tolerance):
    rng = np.random.default_rng(4)
    params = {"w": jnp.asarray(rng.normal(size=(4, 5))), "v": jnp.asarray(rng.normal(size=(5, 3)))}
    given = (model, params, rows(5), rows(6))
    fixed = pdu(optax.sgd(0.02), tolerance=0.1, dual=2.5, dual_rate=0.0)
    summed = TrainingMethod(with_retain(LogitMargin(), RetainNLL(), weight=2.5), optax.sgd(0.02))
    first, second = (
        unlearn(m, *given, steps=3, key=jax.random.clone(key))[0] for m in (fixed, summed)
    )
    tolerance.check(first, second)


def test_the_dual_rises_while_the_constraint_is_broken_and_never_falls_below_zero(tolerance):
    transform = add_constraint_gradient(0.5, dual=2.0, dual_rate=3.0, delay=1)
    u, g = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 4.0])}
    state, dual = transform.init(u), 2.0
    for t, loss in enumerate((9.0, 1.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9)):
        assert float(state.dual) == pytest.approx(dual, rel=1e-6, abs=1e-6)
        out, state = transform.update(u, state, retain_loss=loss, retain_grads=g)
        expected = np.array([1.0, -2.0]) + dual * np.array([0.5, 4.0])
        tolerance.check(out["w"], expected, "rounding")
        dual = dual if t < 1 else max(0.0, dual + 3.0 * (loss - 0.5))
    assert dual == pytest.approx(1.2)


def test_the_row_has_the_published_figures_and_mistakes_get_a_sentence():
    row = CATALOGUE["PDU"]
    assert row.settings == {"tolerance": 0.3, "dual": 100.0, "dual_rate": 5.0, "delay": 0}
    with pytest.raises(ValueError, match="dual must not be negative"):
        pdu(optax.sgd(0.1), tolerance=0.3, dual=-1.0)
    alone = add_constraint_gradient(0.3)
    with pytest.raises(ValueError, match="needs the extra arguments retain_loss"):
        alone.update({"w": jnp.ones(2)}, alone.init(None), retain_loss=jnp.ones(()))
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        pdu(optax.sgd(0.1), tolerance=-0.3)
