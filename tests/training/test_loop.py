"""The training loop against the same loop by hand; its rows, its freezing, its one compilation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jedit.core.batch import Batch
from jedit.objectives import GA, NPO, RetainKL, RetainNLL, with_retain
from jedit.training import TrainingMethod, Watch, fit, unlearn
from jedit.training.rows import row_stream
from tests.training.scene import (
    CLASSES,
    FEATURES,
    GRADDIFF,
    METHOD,
    MOMENTUM,
    apply,
    by_hand,
    make_problem,
    retain_loss,
)


@pytest.fixture
def problem():
    return make_problem()


@pytest.fixture
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("batch_size", [3, 12])
def test_the_loop_is_the_one_by_hand(problem, key, tolerance, batch_size):
    params, forget, retain = problem
    optimizer = optax.adam(0.01)
    before = jax.tree.map(np.asarray, params)
    method = TrainingMethod(GRADDIFF, optimizer, batch_size=batch_size)
    actual, history = unlearn(method, apply, params, forget, retain, steps=6, key=key)
    arguments = {"steps": 6, "key": jax.random.clone(key), "batch_size": batch_size}
    expected, losses = by_hand(GRADDIFF, optimizer, params, forget, retain, **arguments)
    tolerance.check(actual, expected, "factorization")
    tolerance.check(history["loss"], losses, "factorization")
    assert {name: h.shape for name, h in history.items()} == {
        "loss": (6,),
        "forget_nll": (6,),
        "retain_nll": (6,),
    }
    tolerance.check(history["loss"], history["retain_nll"] - history["forget_nll"], "rounding")
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_each_row_is_seen_equally_often_and_steps_do_not_depend_on_their_number(key):
    def rows(first, steps, count=10, size=4):
        return np.asarray(row_stream(count, first, steps, size, key))

    stream = rows(0, 23)
    counts = np.bincount(stream.ravel(), minlength=10)
    assert counts.min() >= 9
    assert counts.max() <= 10
    for start in range(0, 90, 10):
        assert sorted(stream.ravel()[start : start + 10]) == list(range(10))
    for first, steps in ((0, 5), (2, 1), (7, 16), (22, 1)):
        np.testing.assert_array_equal(rows(first, steps), stream[first : first + steps])
    assert not np.array_equal(stream.ravel()[:10], stream.ravel()[10:20])
    assert rows(0, 2, count=3, size=8).shape == (2, 3)


def test_intervals_use_no_key_twice(problem, key):
    params, forget, retain = problem
    _, history = unlearn(
        METHOD, apply, params, forget, retain, steps=5, key=key, watch=Watch(every=2)
    )
    assert history["loss"].shape == (5,)


@pytest.mark.reuses_keys
@pytest.mark.usefixtures("standard_promotion")
def test_looking_on_and_going_on_change_nothing(problem, key, tolerance):
    params, forget, retain = problem
    method = TrainingMethod(with_retain(NPO(), RetainKL()), optax.adam(0.01), batch_size=4)
    run = partial(unlearn, method, apply, forget=forget, retain=retain, key=key)
    whole, history = run(params=params, steps=7)
    seen = []

    def look(state, piece):
        seen.append((jax.tree.map(jnp.copy, state), piece["loss"].shape))

    watched, pieces = run(params=params, steps=7, watch=Watch(look, every=3))
    tolerance.check(watched, whole)
    tolerance.check(pieces, history)
    assert [(state.step, shape) for state, shape in seen] == [(3, (3,)), (6, (3,)), (7, (1,))]
    tolerance.check(seen[0][0].params, run(params=params, steps=3)[0])
    resumed, rest = run(params=seen[0][0], steps=7)
    tolerance.check(resumed, whole)
    tolerance.check(rest["loss"], history["loss"][3:])
    done = []
    watch = Watch(lambda *_: done.append(1))
    past, nothing = run(params=seen[0][0], steps=2, watch=watch)
    assert nothing["loss"].shape == (0,)
    assert not done
    tolerance.check(past, seen[0][0].params)


@pytest.mark.reuses_keys
def test_a_spent_budget_stops_the_loop_at_the_look_before(problem, key, tolerance):
    params, forget, retain = problem
    run = partial(unlearn, METHOD, apply, params, forget, retain, key=key)
    losses = []

    def spent(state, history):
        del history
        losses.append(retain_loss(state.params, retain)[0])
        return len(losses) == 3

    stopped, history = run(steps=20, watch=Watch(spent, every=2))
    assert history["loss"].shape == (6,)
    assert len(losses) == 3
    tolerance.check(stopped, run(steps=4, watch=Watch(every=2))[0])
    assert retain_loss(stopped, retain)[0] == pytest.approx(float(losses[1]), rel=1e-5)


@pytest.mark.reuses_keys
def test_a_network_with_convolutions_takes_the_same_steps(key, tolerance):
    """On CPU it is stepped without a loop, and under a transformation with one."""

    def conv_apply(params, images):
        maps = jax.lax.conv_general_dilated(
            images,
            params["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.tanh(maps).reshape(len(images), -1) @ params["head"]

    parts = jax.random.split(key, 3)
    params = {
        "kernel": jax.random.normal(parts[0], (3, 3, 1, 2)),
        "head": jax.random.normal(parts[1], (32, 3)),
    }
    rows = Batch(jax.random.normal(parts[2], (9, 4, 4, 1)), jnp.arange(9) % 3)
    run = partial(unlearn, METHOD, conv_apply, steps=5)
    stepped, history = run(params, rows, rows, key=key)
    looped, looped_history = jax.jit(lambda p: run(p, rows, rows, key=key))(params)
    assert history["loss"].shape == (5,)
    tolerance.check(stepped, looped, "factorization")
    tolerance.check(history, looped_history, "factorization")


def test_forget_and_retain_draw_different_rows(problem, key):
    """Two sets of one size are not walked in step."""
    params, forget, _ = problem

    def objective(apply, params, forget_rows, retain_rows, reference):
        del apply, reference
        same = jnp.mean(forget_rows.targets == retain_rows.targets)
        return jnp.sum(params["out"] ** 2), {"same": same}

    numbered = forget._replace(targets=jnp.arange(7))
    method = TrainingMethod(objective, optax.sgd(0.1), batch_size=7)
    _, history = unlearn(method, apply, params, numbered, numbered, steps=20, key=key)
    seen = np.asarray(history["same"])
    assert 0.02 < seen.mean() < 0.5  # 1/7 on average


def test_frozen_parameters_are_bit_identical_and_have_no_state(problem, key):
    params, forget, retain = problem
    params = {**params, "step": jnp.array([3], jnp.int32)}
    seen = []
    decayed = optax.chain(optax.add_decayed_weights(0.5), MOMENTUM)

    def init(p):
        seen.append(p)
        return decayed.init(p)

    optimizer = optax.GradientTransformation(init, decayed.update)
    method = TrainingMethod(GRADDIFF, optimizer, trainable="^hidden/")
    new, _ = unlearn(method, apply, params, forget, retain, steps=4, key=key)
    np.testing.assert_array_equal(new["out"], params["out"])
    np.testing.assert_array_equal(new["step"], params["step"])
    assert not np.allclose(new["hidden"]["kernel"], params["hidden"]["kernel"])
    assert len(jax.tree.leaves(seen[0])) == 1


def test_it_traces_once_for_any_number_of_steps_and_calls(problem, key):
    params, forget, retain = problem
    num_traces = 0

    def objective(*given):
        nonlocal num_traces
        num_traces += 1
        return GRADDIFF(*given)

    runs = []
    for fold in range(3):
        new_key = jax.random.fold_in(key, fold)
        method = TrainingMethod(objective, MOMENTUM)
        runs.append(unlearn(method, apply, params, forget, retain, steps=5, key=new_key)[1])
    assert num_traces == 1
    assert not np.array_equal(runs[0]["loss"], runs[1]["loss"])


@pytest.mark.reuses_keys
def test_same_key_same_result(problem, key):
    params, forget, retain = problem
    run = partial(unlearn, METHOD, apply, params, forget, retain, steps=5)
    jax.tree.map(np.testing.assert_array_equal, run(key=key), run(key=key))


@pytest.mark.reuses_keys
def test_sets_may_carry_what_belongs_to_their_rows(problem, key, tolerance):
    """Precomputed reference losses travel with the forget rows."""
    params, forget, _ = problem
    reference = jax.tree.map(lambda p: 0.5 * p, params)
    weights = jnp.arange(7.0).astype(forget.inputs.dtype)

    def weighted(apply, params, rows, retain, reference):
        del retain, reference
        batch, weight = rows
        nll = apply(params, batch.inputs)[:, 0] * weight
        return jnp.sum(nll), {"weight": jnp.sum(weight * batch.inputs[:, 0])}

    numbered = forget._replace(inputs=forget.inputs.at[:, 0].set(weights))
    method = TrainingMethod(weighted, optax.sgd(0.1), batch_size=3)
    _, history = unlearn(method, apply, reference, (numbered, weights), steps=4, key=key)
    rows = np.asarray(row_stream(7, 0, 4, 3, jax.random.split(key, 2)[0]))
    tolerance.check(history["weight"], (rows.astype(float) ** 2).sum(axis=1))


@pytest.mark.parametrize("trainable", [None, "out"])
def test_transforms_get_their_extra_arguments(problem, key, trainable):
    """A projection off the retain gradient, as an optax transform that needs it at each step."""
    params, forget, retain = problem

    def update(updates, state, params=None, *, retain_grads, value, **extra):
        del params, extra
        assert value.shape == ()
        dot = sum(map(jnp.vdot, jax.tree.leaves(updates), jax.tree.leaves(retain_grads)))
        norm = sum(jnp.vdot(g, g) for g in jax.tree.leaves(retain_grads))
        projected = jax.tree.map(lambda u, g: u - dot / norm * g, updates, retain_grads)
        return projected, state

    projection = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)

    def update_args(apply, params, forget, retain, reference):
        del forget, reference
        return {"retain_grads": jax.grad(lambda p: RetainNLL()(apply, p, None, retain)[0])(params)}

    chain = optax.chain(optax.sgd(1e-3), projection)
    method = TrainingMethod(GA(), chain, update_args, trainable, batch_size=19)
    new, _ = unlearn(method, apply, params, forget, retain, steps=1, key=key)
    gradient = jax.grad(retain_loss, has_aux=True)(params, retain)[0]
    change = jax.tree.map(jnp.subtract, new, params)
    change, gradient = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (change, gradient)
    )
    assert np.linalg.norm(change) > 0
    size = np.linalg.norm(change) * np.linalg.norm(gradient)
    assert abs(change @ gradient) < 1e-4 * size


@pytest.mark.parametrize("trainable", [None, "hidden"])
def test_functions_among_the_extra_arguments_get_whole_params(problem, key, trainable, tolerance):
    params, forget, retain = problem

    def update(updates, state, params=None, *, grad_fn, value, **extra):
        del updates, value, extra
        return grad_fn(params), state

    taken = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)

    def update_args(apply, params, forget, retain, reference):
        del params, forget, reference
        return {"grad_fn": jax.grad(lambda p: RetainNLL()(apply, p, None, retain)[0])}

    chain = optax.chain(taken, optax.scale(-0.1))
    method = TrainingMethod(GA(), chain, update_args, trainable, batch_size=19)
    new, _ = unlearn(method, apply, params, forget, retain, steps=1, key=key)
    gradient = jax.grad(retain_loss, has_aux=True)(params, retain)[0]
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    if trainable:
        expected["out"] = params["out"]
    tolerance.check(new, expected)


@pytest.mark.usefixtures("standard_promotion")
def test_unlearning_forgets_and_holds(problem, key):
    params, forget, retain = problem
    k_fit, k_unlearn = jax.random.split(key)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), forget, retain)
    trained, history = fit(
        retain_loss, optax.adam(0.05), params, both, epochs=60, batch_size=8, key=k_fit
    )
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    held, bare = (
        unlearn(
            TrainingMethod(x, optax.adam(0.01)), apply, trained, forget, retain, steps=60, key=k
        )
        for x, k in ((GRADDIFF, k_unlearn), (GA(), jax.random.clone(k_unlearn)))
    )
    for _, history in (held, bare):
        assert history["forget_nll"][-1] > history["forget_nll"][0] + 1
    # The retain term is what keeps the retain loss down.
    with_term, without = (retain_loss(params, retain)[0] for params in (held[0], bare[0]))
    assert with_term < without


def test_fit_counts_epochs_in_fractions_too(problem, key):
    params, _, retain = problem
    run = partial(fit, retain_loss, optax.sgd(0.1), params, retain, key=key)

    def num_steps(**arguments):
        return jax.eval_shape(lambda: run(**arguments)[1]["loss"]).shape[0]

    assert num_steps(epochs=2, batch_size=4) == 10  # 38 rows in fours
    assert num_steps(epochs=2, batch_size=100) == 2
    assert num_steps(epochs=0.5, batch_size=4) == 3  # nine and a half rows
    for steps in range(1, 60):
        assert num_steps(epochs=steps * 7 / 19, batch_size=7) == steps
    unchanged, history = run(epochs=0)
    jax.tree.map(np.testing.assert_array_equal, unchanged, params)
    assert history["loss"].shape == (0,)


@pytest.mark.reuses_keys
def test_it_vmaps_over_requests(problem, key, tolerance):
    """A stack of forget sets in, a stack of models out."""
    params, forget, retain = problem
    stack = jax.tree.map(lambda x: jnp.stack([x[:3], x[3:6]]), forget)
    run = partial(unlearn, METHOD._replace(batch_size=2), apply, steps=3)
    many, _ = jax.vmap(lambda rows: run(params, rows, retain, key=key))(stack)
    one, _ = run(params, jax.tree.map(lambda x: x[1], stack), retain, key=key)
    tolerance.check(jax.tree.map(lambda x: x[1], many), one, "factorization")


def test_an_nnx_state_is_params_like_any_other(problem, key):
    forget, retain = (rows._replace(inputs=rows.inputs.astype(jnp.float32)) for rows in problem[1:])
    graph, state = nnx.split(nnx.Linear(FEATURES, CLASSES, rngs=nnx.Rngs(0)))
    method = TrainingMethod(GRADDIFF, MOMENTUM, trainable="kernel")
    model = lambda p, x: nnx.merge(graph, p)(x)  # noqa: E731
    new, _ = unlearn(method, model, state, forget, retain, steps=3, key=key)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    np.testing.assert_array_equal(new["bias"][...], state["bias"][...])
    assert not np.array_equal(new["kernel"][...], state["kernel"][...])


def test_bfloat16_stays_bfloat16(problem, key):
    params, forget, retain = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, problem
    )
    method = TrainingMethod(GRADDIFF, optax.sgd(0.1))
    new, history = unlearn(method, apply, params, forget, retain, steps=2, key=key)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    assert history["loss"].dtype == jnp.float32


@pytest.mark.reuses_keys
def test_mistakes_get_a_sentence(problem, key):
    params, forget, retain = problem

    def run(forget, retain, *, steps=1, watch=None, **changed):
        method = TrainingMethod(GRADDIFF, optax.sgd(0.1))._replace(**changed)
        return unlearn(method, apply, params, forget, retain, steps=steps, key=key, watch=watch)

    with pytest.raises(ValueError, match=r"matches no real parameter; paths: \['hidden/kernel'"):
        run(forget, retain, trainable="attention")
    with pytest.raises(ValueError, match="must lead with its rows"):
        run(forget._replace(targets=forget.targets[:3]), retain)
    with pytest.raises(ValueError, match="forget counts no output: it has no rows"):
        run(jax.tree.map(lambda x: x[:0], forget), retain)
    for mistake in ({"steps": -1}, {"batch_size": 0}, {"watch": Watch(every=0)}):
        with pytest.raises(ValueError, match="(steps|batch_size|every) must be at least [01]"):
            run(forget, retain, **mistake)
    with pytest.raises(TypeError, match="the objective is an argument of the compiler"):
        run(forget, retain, objective=with_retain(NPO(beta=jnp.asarray(0.1))))
    with pytest.raises(TypeError, match=r"retain must be a jedit\.Batch, got None"):
        run(forget, None)
    with pytest.raises(ValueError, match="epochs must not be negative"):
        fit(retain_loss, optax.sgd(0.1), params, retain, key=key, epochs=-1)
