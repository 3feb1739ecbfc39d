"""The geometric transforms in training loops: what they promise of the change really made."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac, solve
from jedit.curvature.likelihoods import Categorical
from jedit.geometry import null_space, project
from jedit.transforms import (
    ignore_top_fraction,
    orthogonalize_to_retain,
    project_realised_update,
    project_to_null_space,
    retain_neutral_surrogate,
    scale_by_curvature,
)


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax's own Adam mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


def loss(params, batch):
    logits = jax.nn.log_softmax(network(params, batch.inputs))
    return -jnp.mean(jnp.take_along_axis(logits, batch.targets[:, None], axis=1))


@pytest.fixture
def scene():
    rng = np.random.default_rng(9)
    shapes = {"w": (8, 5), "b": (5,), "v": (5, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    retained = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 8))
    retain = Batch(jnp.asarray(retained), jnp.asarray(rng.integers(0, 3, 40)))
    forget = Batch(jnp.asarray(rng.normal(size=(10, 8))), jnp.asarray(rng.integers(0, 3, 10)))
    curvature = scene_curvature(params, retain)
    return params, forget, retain, null_space(curvature, threshold=1e-6)


def scene_curvature(params, retain):
    estimator = kfac(network, Categorical(), select="w|b", fisher="exact")
    return estimate(estimator, params, [retain], key=jax.random.key(0))


def train(optimizer, params, forget, *, steps=20, **extras):
    """Ascend the forget loss."""
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(jnp.negative, jax.grad(loss)(params, forget))
        given = {name: make(params) for name, make in extras.items()}
        updates, state = optimizer.update(gradient, state, params, **given)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def change(after, before):
    return jax.tree.map(jnp.subtract, after, before)


@pytest.mark.parametrize("last", [project_to_null_space, project_realised_update])
def test_retained_outputs_stay_through_adam_and_weight_decay(scene, last, tolerance):
    params, forget, retain, projector = scene
    optimizer = optax.chain(optax.adamw(0.05, weight_decay=0.1), last(projector))
    moved, _ = train(optimizer, params, forget)
    np.testing.assert_allclose(
        network(moved, retain.inputs),
        network(params, retain.inputs),
        atol=100 * tolerance.factorization,
    )
    assert loss(moved, forget) > loss(params, forget) + 0.3
    # Before Adam it promises nothing: this is what the place in the chain is worth.
    wrong = optax.chain(last(projector), optax.adamw(0.05, weight_decay=0.1))
    moved, _ = train(wrong, params, forget)
    drift = np.abs(network(moved, retain.inputs) - network(params, retain.inputs)).max()
    assert drift > 1e-2


def test_what_rounding_lets_out_is_taken_back(scene):
    """Many steps below the resolution of bfloat16: the plain projection drifts, this one not."""
    params, forget, _, projector = scene
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    low = forget._replace(inputs=forget.inputs.astype(jnp.bfloat16))
    leaks = {}
    for last in (project_to_null_space, project_realised_update):
        optimizer = optax.chain(optax.sgd(0.02), last(projector))
        moved, _ = train(optimizer, half, low, steps=150)
        made = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), moved, half)
        leak = change(made, project(projector, made, uncovered="identity"))
        leaks[last] = np.linalg.norm(flat(leak))
    assert leaks[project_realised_update] < 0.5 * leaks[project_to_null_space]


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_last_in_a_chain_the_step_does_not_move_the_retain_loss(scene, scope, tolerance):
    params, forget, retain, _ = scene
    optimizer = optax.chain(
        optax.adamw(1e-3, weight_decay=0.1), orthogonalize_to_retain(rank=1, scope=scope)
    )
    grad = lambda p: jax.grad(loss)(p, retain)  # noqa: E731
    moved, _ = train(optimizer, params, forget, steps=1, retain_grads=grad)
    step, gradient = flat(change(moved, params)), flat(grad(params))
    assert np.linalg.norm(step) > 1e-4
    size = np.linalg.norm(step) * np.linalg.norm(gradient)
    assert abs(step @ gradient) < 100 * tolerance.factorization * size


def test_a_function_of_retain_gradients_is_called_at_every_refresh_alone(scene, tolerance):
    params, forget, retain, _ = scene
    optimizer = optax.chain(optax.sgd(0.1), orthogonalize_to_retain(rank=4, refresh=3))
    grad = lambda p: jax.grad(loss)(p, retain)  # noqa: E731
    state, moved, seen = optimizer.init(params), params, []
    for k in range(7):
        if k % 3 == 0:
            seen.append(grad(moved))
        updates, state = optimizer.update(
            jax.grad(loss)(moved, forget), state, moved, retain_grad_fn=grad
        )
        moved = optax.apply_updates(moved, updates)
    assert int(state[1].subspace.count) == 3
    for i, gradient in enumerate(seen):
        tolerance.check(jax.tree.map(lambda r, i=i: r[i], state[1].subspace.rows), gradient)


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_in_adams_metric_every_step_really_made_leaves_the_retain_loss_alone(
    scene, scope, tolerance
):
    """GU: the second moment moves from step to step, and the constraint with it."""
    params, forget, retain, _ = scene
    transform = orthogonalize_to_retain(rank=1, metric="adam", scope=scope, decay=0.9, eps=1e-6)
    optimizer = optax.chain(transform, optax.scale_by_learning_rate(1e-2))
    state, moved, second = optimizer.init(params), params, 0.0
    for count in range(1, 4):
        gradient, retain_gradient = (jax.grad(loss)(moved, batch) for batch in (forget, retain))
        updates, state = optimizer.update(gradient, state, moved, retain_grads=retain_gradient)
        step, r, g = flat(updates), flat(retain_gradient), flat(gradient)
        assert abs(step @ r) < 100 * tolerance.factorization * np.linalg.norm(step) * (
            np.linalg.norm(r)
        )
        second = 0.9 * second + 0.1 * g**2
        h = np.sqrt(second / (1 - 0.9**count)) + 1e-6
        if scope == "global":  # z off z_r, scaled as Adam scales
            z, z_r = g / np.sqrt(h), r / np.sqrt(h)
            expected = -1e-2 * (z - (z @ z_r) / (z_r @ z_r) * z_r) / np.sqrt(h)
            np.testing.assert_allclose(step, expected, atol=100 * tolerance.factorization)
        moved = optax.apply_updates(moved, updates)


def test_a_relaxed_projection_is_not_taken_back(scene, tolerance):
    params, forget, _, _ = scene
    relaxed = null_space(scene_curvature(params, scene[2]), threshold=0.3, relaxation=2.0)
    moved = [
        train(optax.chain(optax.sgd(0.02), last(relaxed)), params, forget)[0]
        for last in (project_to_null_space, project_realised_update)
    ]
    tolerance.check(moved[1], moved[0], "factorization")


@pytest.mark.parametrize(
    ("outer", "strength"), [("transport", 1.0), ("amplify", 0.7), ("push", 0.3)]
)
@pytest.mark.parametrize("constrained", [True, False])
def test_the_surrogates_gradient_is_taken_where_it_says(
    scene, outer, strength, constrained, tolerance
):
    params, forget, retain, _ = scene
    radius = 0.4
    transform = retain_neutral_surrogate(
        radius, outer=outer, strength=strength, constrained=constrained
    )
    g_f, g_r = jax.grad(loss)(params, forget), jax.grad(loss)(params, retain)
    grad_fn = lambda p: jax.grad(loss)(p, retain)  # noqa: E731
    out, state = transform.update(
        g_r, transform.init(params), params, forget_grads=g_f, grad_fn=grad_fn
    )
    f, r = flat(g_f), flat(g_r)
    q = f - (f @ r) / (r @ r) * r if constrained else f
    unit = q / np.linalg.norm(q)
    leaves, treedef = jax.tree.flatten(params)
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
    there = [
        p + d.reshape(p.shape) for p, d in zip(leaves, np.split(radius * unit, cuts), strict=True)
    ]
    expected = flat(jax.grad(loss)(treedef.unflatten(there), retain))
    along = expected @ unit
    if outer == "amplify":
        expected = expected - strength * max(along, 0) * unit
    elif outer == "push":
        expected = expected - strength * np.linalg.norm(expected) * unit
    np.testing.assert_allclose(flat(out), expected, atol=100 * tolerance.contraction)
    assert float(state.info.forget_gain) == pytest.approx(
        radius * f @ unit, rel=100 * tolerance.contraction
    )


@pytest.mark.parametrize(("fraction", "dropped"), [(0.0, 0), (0.25, 2), (0.8, 6), (1.0, 8)])
def test_the_largest_entries_are_left_out(fraction, dropped):
    update = {"a": jnp.asarray([3.0, -9.0, 1.0, 0.5]), "b": jnp.asarray([[-2.0, 8.0, 0.125, 4.0]])}
    transform = ignore_top_fraction(fraction, scope="global")
    out, _ = transform.update(update, transform.init(update))
    order = np.argsort(np.abs(flat(update)))
    expected = flat(update)
    expected[order[8 - dropped :]] = 0
    np.testing.assert_array_equal(flat(out), expected)
    leafwise = ignore_top_fraction(0.25)
    out, _ = leafwise.update(update, leafwise.init(update))
    np.testing.assert_array_equal(flat(out), [3, 0, 1, 0.5, -2, 0, 0.125, 4])


def test_in_a_curvatures_metric_the_change_is_the_least_in_it(scene, tolerance):
    """u - g (gᵀM u)/(gᵀM g) with M = (F + λ)⁻¹, by one solve and no square root."""
    params, forget, retain, _ = scene
    covered = {name: params[name] for name in ("w", "b")}
    curvature = scene_curvature(params, retain)
    full = lambda p: params | p  # noqa: E731
    update = jax.grad(lambda p: loss(full(p), forget))(covered)
    held = jax.grad(lambda p: loss(full(p), retain))(covered)
    transform = orthogonalize_to_retain(1, metric=curvature, scope="global", damping=0.3)
    state = transform.init(covered)
    jax.tree.map(np.testing.assert_array_equal, state.curvature, curvature)
    out, _ = transform.update(update, state, retain_grads=held)
    solved = solve(curvature, held, damping=0.3)
    dot = lambda a, b: flat(a) @ flat(b)  # noqa: E731
    share = dot(solved, update) / dot(solved, held)
    expected = jax.tree.map(lambda u, g: u - share * g, update, held)
    tolerance.check(out, expected, "factorization")
    # The step that is really made leaves the retain loss alone, also with more in the basis.
    chain = optax.chain(
        orthogonalize_to_retain(2, metric=curvature, scope="global", damping=0.3),
        scale_by_curvature(curvature, damping=0.3, uncovered="identity"),
        optax.scale_by_learning_rate(0.1),
    )
    state, other = chain.init(covered), jax.tree.map(jnp.cos, held)
    for grads in (other, held):
        step, state = chain.update(update, state, retain_grads=grads)
    for grads in (other, held):
        size = np.linalg.norm(flat(step)) * np.linalg.norm(flat(grads))
        assert abs(dot(step, grads)) < 10 * tolerance.factorization * size
    assert abs(dot(update, held)) > 1e-3


def test_an_nnx_optimizer_takes_them(scene):
    _, forget, retain, _ = scene
    as_float = lambda b: b._replace(inputs=b.inputs.astype(jnp.float32))  # noqa: E731
    forget, retain = as_float(forget), as_float(retain)
    model = nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(optax.adam(1e-2), orthogonalize_to_retain(rank=2)), wrt=nnx.Param
    )

    def nll(model, batch):
        logits = jax.nn.log_softmax(model(batch.inputs))
        return -jnp.mean(jnp.take_along_axis(logits, batch.targets[:, None], axis=1))

    before = nll(model, retain)
    for _ in range(3):
        retain_grads = nnx.grad(nll)(model, retain)
        ascent = jax.tree.map(jnp.negative, nnx.grad(nll)(model, forget))
        optimizer.update(model, ascent, retain_grads=retain_grads)
    assert abs(float(nll(model, retain) - before)) < 1e-2


def test_mistakes_get_a_sentence(scene):
    params, _, _, projector = scene
    for make in (
        lambda: orthogonalize_to_retain(refresh=0),
        lambda: orthogonalize_to_retain(metric="fisher"),
    ):
        with pytest.raises(ValueError, match="refresh must be at least 1|metric must be one of"):
            make()
    transform = orthogonalize_to_retain()
    state = transform.init(params)
    for extras in ({}, {"retain_grads": params, "retain_grad_fn": lambda p: p}):
        with pytest.raises(ValueError, match="needs one of the extra arguments"):
            transform.update(params, state, params, **extras)
    with pytest.raises(ValueError, match="retain_grad_fn needs params"):
        transform.update(params, state, retain_grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="outer must be one of"):
        retain_neutral_surrogate(0.1, outer="pull")
    with pytest.raises(ValueError, match="radius must be positive, got -0.1"):
        retain_neutral_surrogate(-0.1)
    transform = retain_neutral_surrogate(0.1)
    with pytest.raises(ValueError, match="needs params and the extra arguments"):
        transform.update(params, transform.init(params), params)
    transform = project_realised_update(projector)
    with pytest.raises(ValueError, match="needs params"):
        transform.update(params, transform.init(params))
    for mistake in ({"fraction": 1.5}, {"fraction": 0.1, "scope": "layer"}):
        with pytest.raises(ValueError, match="fraction must be from 0 to 1|scope must be one of"):
            ignore_top_fraction(**mistake)
