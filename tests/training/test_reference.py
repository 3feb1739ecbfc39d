"""What the loop gives to objectives: one program for equal ones, and the params it began with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.objectives import NPO, RetainKL, with_retain
from jedit.training import LoopState, TrainingMethod, Watch, unlearn
from tests.training.scene import MOMENTUM, apply, by_hand, make_problem


@pytest.fixture
def problem():
    return make_problem()


@pytest.mark.reuses_keys
def test_equal_objectives_compile_once(problem, key):
    """Built anew for each call, as a user does; another number is another program."""
    params, forget, retain = problem
    traced = []

    def counting(params, inputs):
        traced.append(1)
        return apply(params, inputs)

    def run(beta):
        method = TrainingMethod(with_retain(NPO(beta=beta), RetainKL(), weight=0.5), MOMENTUM)
        return unlearn(method, counting, params, forget, retain, steps=3, key=key)[1]["loss"]

    first = run(0.5)
    once = len(traced)
    np.testing.assert_array_equal(run(0.5), first)
    assert len(traced) == once
    assert not np.allclose(run(0.7), first)
    assert len(traced) == 2 * once


@pytest.mark.reuses_keys
@pytest.mark.parametrize("trainable", [None, "out"])
def test_the_reference_is_where_unlearning_began(problem, key, tolerance, trainable):
    """By hand, against the start's own losses; and after a break, at which params have moved."""
    params, forget, retain = problem
    objective = with_retain(NPO(beta=0.7), RetainKL(), weight=2.0)
    method = TrainingMethod(objective, MOMENTUM, trainable=trainable, batch_size=4)
    run = partial(unlearn, method, apply, forget=forget, retain=retain, key=key)
    fixed = lambda _, p, f, r: objective(apply, p, f, r, params)  # noqa: E731
    optimizer = MOMENTUM
    if trainable:
        parts = {"frozen": optax.set_to_zero(), "trained": MOMENTUM}
        labels = {"hidden": {"kernel": "frozen"}, "out": "trained"}
        optimizer = optax.multi_transform(parts, labels)
    expected, losses = by_hand(
        fixed, optimizer, params, forget, retain, steps=6, key=key, batch_size=4
    )
    states = []

    def look(state, history):
        del history
        states.append(
            state._replace(
                **{
                    name: jax.tree.map(jnp.copy, getattr(state, name))
                    for name in ("params", "optimizer_state")
                }
            )
        )

    actual, history = run(params=params, steps=6, watch=Watch(look, every=2))
    tolerance.check(actual, expected, "factorization")
    tolerance.check(history["loss"], losses, "factorization")
    # Not a copy: it is what the caller gave.
    for mine, given in zip(*map(jax.tree.leaves, (states[1].reference, params)), strict=True):
        assert mine is given
    resumed, rest = run(params=states[1], steps=6)
    tolerance.check(resumed, expected, "factorization")
    tolerance.check(rest["loss"], losses[4:], "factorization")
    forgotten, _ = run(params=states[1]._replace(reference=None), steps=6)
    assert not np.allclose(forgotten["out"], expected["out"], rtol=1e-3)


@pytest.mark.reuses_keys
def test_the_reference_is_an_argument_and_not_a_constant(problem, key, tolerance):
    params, forget, retain = problem
    num_traces = 0

    def objective(*given):
        nonlocal num_traces
        num_traces += 1
        return NPO()(*given)

    method = TrainingMethod(objective, optax.sgd(0.01))
    other = jax.tree.map(lambda p: 0.5 * p, params)

    def run(method, reference):
        start = LoopState(0, params, None, reference)
        return unlearn(method, apply, start, forget, retain, steps=3, key=key)[1]["loss"]

    first, second = run(method, None), run(method, other)
    assert num_traces == 1
    assert not np.allclose(first, second)
    baked = lambda apply, p, f, r, reference: NPO()(apply, p, f, r, other)  # noqa: ARG005, E731
    tolerance.check(second, run(TrainingMethod(baked, optax.sgd(0.01)), None), "rounding")
