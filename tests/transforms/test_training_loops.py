"""Every transform of the contract table in the training loops of four libraries.

Each loop compiles once, does what optax alone does with the same numbers, and the change of the
parameters that it really makes satisfies the transform's constraint.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.curvature import estimate, kfac, quadratic_form
from jedit.curvature.likelihoods import Categorical
from jedit.geometry import null_space, project
from jedit.transforms import mask_to_salient, orthogonalize_to_retain, with_update_args
from tests.test_contract import SALIENCY, TRANSFORMS, _retain_grads, _stored, make_scene
from tests.tracing.oracle import user_rules
from tests.transforms.training_loops import LOOPS, by_optax_alone, plain

STEPS = 3
# These make a gradient of gradients; all others bound the step that comes out at the end.
OF_GRADIENTS = (
    "scale_by_curvature",
    "retain_neutral_surrogate",
    "add_l1_gradient",
    "orthogonalize_to_retain in Adam's metric",
    "orthogonalize_to_retain in a curvature's metric",
)
ROWS = {row.name: row for row in TRANSFORMS}


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with user_rules():
        yield


@functools.cache
def scene():
    """Named arrays, the loss and the curvature of the network, all made once."""
    _, params, _, forget, retain = make_scene(jax.random.key(0), jnp.result_type(float))
    return params, Gradient(forget), retain, curvature_of(plain())


def curvature_of(loop):
    """The retain outputs' curvature of the first layer, labels summed over and not drawn."""
    _, params, _, _, retain = make_scene(jax.random.key(0), jnp.result_type(float))
    select = "hidden|^w|^b"
    estimator = kfac(loop.apply, Categorical(), select=select, fisher="exact")
    return estimate(estimator, loop.tree(params), [retain], key=jax.random.key(0))


class Gradient:
    """Of a loss that is to rise: the forget rows'."""

    def __init__(self, forget):
        self.forget = forget

    def loss(self, model):
        logits = model(self.forget.inputs)
        return -optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, self.forget.targets
        ).mean()

    def __call__(self, apply, params):
        return jax.grad(lambda p: self.loss(lambda x: apply(p, x)))(params)


def run(row, loop, curvature):
    """Parameters after each step of one library's loop, and how often it was traced."""
    params, gradient, _, _ = scene()
    made = row.make(curvature)
    if row.name == "mask_to_salient":
        made = mask_to_salient(loop.tree(jax.tree.map(jnp.asarray, SALIENCY)), 0.4)
    if row.name in OF_GRADIENTS:
        optimizer = optax.chain(made, optax.scale(-0.1))
    else:
        optimizer = optax.chain(optax.adamw(0.1, weight_decay=0.1), made)
    return loop.run(params, optimizer, row.extras, gradient, STEPS)


@functools.cache
def reference(name):
    """The same by optax alone."""
    seen, _ = run(ROWS[name], plain(), scene()[-1])
    return seen


def check_constraint(name, before, change, k):
    """What a transform promises of the change that is really made, at step k."""
    curvature = scene()[-1]
    tolerance = 1e-9 if jax.config.jax_enable_x64 else 2e-5
    size = max(float(jnp.max(jnp.abs(x))) for x in change.values())
    assert size > 0

    def vanishes(x):
        assert float(jnp.max(jnp.abs(x))) <= tolerance * max(size, 1), name

    if name in {"scale_by_curvature", "project_to_null_space", "project_realised_update"}:
        vanishes(change["v"])
    if name in {"project_to_null_space", "project_realised_update"}:
        kept = project(null_space(curvature, threshold=0.2), change)
        jax.tree.map(lambda x, y: vanishes(x - y), kept, change)
    if name == "project_out_stored":
        parts = jax.tree.map(jnp.vdot, change, _stored(before)["stored"])
        vanishes(sum(jax.tree.leaves(parts)))
    if name == "clip_by_curvature_norm":
        spent = 0.5 * float(quadratic_form(curvature, change))
        np.testing.assert_allclose(spent, 1e-3, rtol=1e-3)
    if name == "orthogonalize_to_retain":
        jax.tree.map(
            lambda x, g: vanishes(jnp.vdot(x, g)), change, _retain_grads(before)["retain_grads"]
        )
    if name == "orthogonalize_to_retain in Adam's metric" and k == 0:
        parts = jax.tree.map(jnp.vdot, change, _retain_grads(before)["retain_grads"])
        vanishes(sum(jax.tree.leaves(parts)))
    if name == "ignore_top_fraction":
        for x in change.values():
            assert jnp.sum(x == 0) >= round(0.3 * x.size)
    if name == "mask_to_salient":
        assert sum(int(jnp.sum(x != 0)) for x in change.values()) == round(0.4 * 48)
        assert not jnp.any(change["v"])
        assert not jnp.any(change["b"])


@pytest.fixture(params=LOOPS, scope="module")
def library(request):
    """One library's loop, and the curvature of its network."""
    with user_rules():
        loop = LOOPS[request.param]()
        return loop, curvature_of(loop)


def check_row(name, library, tolerance):
    """One transform in one library's loop."""
    loop, curvature = library
    seen, traces = run(ROWS[name], loop, curvature)
    assert traces == 1
    before = scene()[0]
    expectations = reference(name)
    if "names" in ROWS[name].excused:
        expectations, _ = run(ROWS[name], by_optax_alone(loop), curvature)
    for k, (found, expected) in enumerate(zip(seen, expectations, strict=True)):
        tolerance.check(dict(found), expected, "factorization")
        check_constraint(name, before, jax.tree.map(jnp.subtract, dict(found), before), k)
        before = dict(found)


@pytest.mark.parametrize("name", ROWS)
def test_a_transform_in_a_library_s_loop(name, library, tolerance):
    check_row(name, library, tolerance)


def test_arguments_are_made_from_the_data_in_the_state():
    """Two sets of data, one program; without params it says what it needs."""
    params, gradient, retain, _ = scene()

    def gradients(p, rows):
        return {"retain_grads": jax.grad(lambda p: jnp.sum(plain().apply(p, rows) ** 2))(p)}

    traces, found = [], []

    @jax.jit
    def step(transform_state, updates):
        traces.append(1)
        return transform.update(updates, transform_state, params)

    for rows in (retain.inputs, 2 * retain.inputs):
        transform = with_update_args(orthogonalize_to_retain(1), gradients, rows)
        out, _ = step(transform.init(params), params)
        own = orthogonalize_to_retain(1)
        expected, _ = own.update(params, own.init(params), params, **gradients(params, rows))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), out, expected
        )
        found.append(out)
    assert len(traces) == 1
    assert not np.allclose(found[0]["w"], found[1]["w"])
    with pytest.raises(ValueError, match="with_update_args needs params"):
        transform.update(params, transform.init(params))


def test_a_saliency_that_lacks_a_parameter_is_refused():
    params = scene()[0]
    with pytest.raises(ValueError, match="has no leaf 'v', which is trained; its leaves are b, w"):
        mask_to_salient({n: params[n] for n in ("b", "w")}).init(params)
