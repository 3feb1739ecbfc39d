"""Interventions at sites against functions written out with the change in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.tracing import intervene


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 6), "b": (6,), "v": (6, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(5, 4))), rng


def test_without_a_change_it_is_apply(scene, tolerance):
    params, x, _ = scene
    found = intervene(network, params, x)
    hidden = x @ params["w"] + params["b"][None]
    tolerance.check(found.outputs, network(params, x))
    tolerance.check(found.site_outputs, {"w": x @ params["w"], "v": network(params, x)})
    tolerance.check(found.activations, {"w": x, "v": jnp.tanh(hidden)})


def test_adding_and_its_derivative(scene, tolerance):
    params, x, rng = scene
    delta = jnp.asarray(rng.normal(size=(5, 6)))

    def by_hand(delta):
        hidden = x @ params["w"] + params["b"][None] + delta
        return jnp.tanh(hidden) @ params["v"]

    def by_site(delta):
        return intervene(network, params, x, add={"w": delta}).outputs

    tolerance.check(by_site(delta), by_hand(delta))
    total = lambda f: jax.grad(lambda d: jnp.sum(f(d) ** 2))(delta)  # noqa: E731
    tolerance.check(total(by_site), total(by_hand))


def test_patching_one_run_into_another(scene, tolerance):
    params, x, rng = scene
    other = jnp.asarray(rng.normal(size=(5, 4)))
    clean = intervene(network, params, x).site_outputs["w"]
    mask = jnp.asarray([True, False, True, False, False])[:, None]
    found = jax.jit(lambda x: intervene(network, params, x, replace={"w": (mask, clean)}))(other)
    outputs, corrupted = network(params, x), network(params, other)
    tolerance.check(found.outputs, jnp.where(mask, outputs, corrupted))
    tolerance.check(found.site_outputs["w"], jnp.where(mask, clean, other @ params["w"]))


def test_in_a_scan_over_layers_every_layer_has_its_own(tolerance):
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4, 4)))}
    x = jnp.asarray(rng.normal(size=(2, 4)))

    def stack(params, x):
        step = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None))
        return jax.lax.scan(step, x, params["w"])[0]

    delta = jnp.asarray(rng.normal(size=(3, 2, 4)))
    expected, outputs = x, []
    for i in range(3):
        outputs.append(expected @ params["w"][i] + delta[i])
        expected = expected + jnp.tanh(outputs[-1])
    found = intervene(stack, params, x, add={"w": delta})
    tolerance.check(found.outputs, expected)
    tolerance.check(found.site_outputs["w"], jnp.stack(outputs))
    # Putting the outputs of that run in place of a plain one's gives that run.
    mask = jnp.ones((3, 1, 1), bool)
    patched = intervene(stack, params, x, replace={"w": (mask, jnp.stack(outputs))})
    tolerance.check(patched.outputs, expected)


def test_a_branch_not_taken_has_outputs_of_zero(tolerance):
    def switched(params, x):
        branches = (lambda x: x @ params["w"], lambda x: x @ params["v"])
        return jax.lax.cond(x[0, 0] > 0, *branches, x)

    params = {"w": jnp.eye(2), "v": 2 * jnp.eye(2)}
    found = intervene(switched, params, jnp.ones((1, 2)), add={"w": jnp.ones((1, 2))})
    tolerance.check(found.outputs, 2 * jnp.ones((1, 2)))
    tolerance.check(found.site_outputs, {"v": jnp.zeros((1, 2)), "w": 2 * jnp.ones((1, 2))})


def test_mistakes_get_a_sentence(scene):
    params, x, _ = scene
    with pytest.raises(ValueError, match="are no sites of this function"):
        intervene(network, params, x, add={"u": jnp.zeros(())})
    zero = jnp.zeros(())
    with pytest.raises(ValueError, match="stand in add and in replace"):
        intervene(network, params, x, add={"w": zero}, replace={"w": (zero, zero)})
