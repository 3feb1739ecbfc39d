"""Adapters trained through whole matrices, against adapters that are differentiated themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.models import with_lora
from jedit.tracing import find_sites
from jedit.transforms import Adapter, train_adapters

D_IN, HEADS, HEAD, CLASSES = 5, 2, 3, 4


@pytest.fixture(autouse=True)
def _standard_promotion():
    """What optax's Adam mixes, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    mixed = jnp.einsum("bd,dnh->bnh", x, params["q"]) + params["c"][None]
    return jnp.einsum("bnh,nhd->bd", jnp.tanh(mixed), params["o"])


@pytest.fixture
def scene():
    rng = np.random.default_rng(5)
    shapes = {"q": (D_IN, HEADS, HEAD), "c": (HEADS, HEAD), "o": (HEADS, HEAD, CLASSES)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x, y = jnp.asarray(rng.normal(size=(7, D_IN))), jnp.asarray(rng.normal(size=(7, CLASSES)))
    sizes = {"q": (D_IN, HEADS * HEAD), "o": (HEADS * HEAD, CLASSES)}
    pairs = {
        name: (jnp.asarray(rng.normal(size=(rows, 2))), jnp.asarray(rng.normal(size=(2, columns))))
        for name, (rows, columns) in sizes.items()
    }
    off = {
        name: jnp.asarray(np.linalg.qr(rng.normal(size=(columns, 3)))[0])
        for name, (_, columns) in sizes.items()
    }
    return params, x, y, pairs, off


@pytest.mark.parametrize("optimizer", [optax.sgd(0.02, momentum=0.9), optax.adam(0.03)])
def test_it_trains_what_differentiating_the_adapters_trains(scene, optimizer, key, tolerance):
    params, x, y, pairs, off = scene
    scale, weight = 0.7, 0.3

    def loss(apply, params):
        return jnp.mean((apply(params, x) - y) ** 2)

    adapted = with_lora(network, params, x, rank=2, key=key, scale=scale)
    begun = adapted.start(pairs)
    tolerance.check(adapted.apply(begun, x), network(params, x))
    moved = np.abs(np.asarray(begun["base"]["q"] - params["q"]))
    assert moved.max() > 0.1, "what the adapters add is not taken off the weights"

    def held(lora):
        return weight * sum(jnp.sum((lora[name]["b"] @ off[name]) ** 2) for name in off)

    lora, state = begun["lora"], optimizer.init(begun["lora"])
    for _ in range(6):
        whole = lambda lora: loss(adapted.apply, {**begun, "lora": lora}) + held(lora)  # noqa: E731
        updates, state = optimizer.update(jax.grad(whole)(lora), state, lora)
        lora = optax.apply_updates(lora, updates)
    expected = adapted.merge({**begun, "lora": lora})

    sites = find_sites(network, params, x)
    adapters = {
        name: Adapter(sites[name].weight.kernel, a[None], b[None], off[name][None])
        for name, (a, b) in pairs.items()
    }
    transform = train_adapters(optimizer, adapters, scale=scale, weight=weight)
    reached, state = params, transform.init(params)
    step = jax.jit(transform.update)
    for _ in range(6):
        updates, state = step(jax.grad(lambda p: loss(network, p))(reached), state, reached)
        reached = optax.apply_updates(reached, updates)
    tolerance.check(reached, expected, "factorization")
    np.testing.assert_array_equal(reached["c"], params["c"])
    assert np.abs(np.asarray(reached["q"] - params["q"])).max() > 1e-2


def test_extra_arguments_reach_the_optimizer(scene):
    """A plateau's `value`, for instance; not what is like the parameters, or asks for them."""
    params, x, _, pairs, _ = scene
    weight = find_sites(network, params, x)["q"].weight.kernel
    given = {}

    def update(updates, state, params=None, **extra):
        del params
        given.update(extra)
        return updates, state

    optimizer = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    transform = train_adapters(optimizer, {"q": Adapter(weight, *(p[None] for p in pairs["q"]))})
    state = transform.init(params)
    extras = {"value": jnp.float32(2.0), "forget_grads": params, "grad_fn": lambda p: p}
    transform.update(params, state, params, **extras)
    assert given == {"value": 2.0}


def test_what_is_begun_is_what_bfloat16_holds(scene, key):
    """The pairs are rounded to be kept: it is their product that is taken off the weights."""
    params, x, _, pairs, _ = scene
    narrow = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)
    adapted = with_lora(network, narrow, x.astype(jnp.bfloat16), rank=2, key=key)
    begun = adapted.start(pairs)
    a, b = (np.asarray(p.astype(jnp.bfloat16), np.float32) for p in pairs["q"])
    expected = jnp.asarray(-(a @ b), jnp.bfloat16)
    np.testing.assert_array_equal(begun["base"]["q"].reshape(expected.shape), expected)


def _update_without_q(adapter, params):
    transform = train_adapters(optax.sgd(1.0), {"q": adapter})
    transform.update(params, transform.init(params), params)


def test_what_is_no_adapter_is_refused(scene, key):
    params, x, _, pairs, _ = scene
    weight = find_sites(network, params, x)["q"].weight.kernel
    a, b = (one[None] for one in pairs["q"])
    with pytest.raises(ValueError, match="no adapters"):
        train_adapters(optax.sgd(1.0), {})
    with pytest.raises(ValueError, match=r"'q' has A \(1, 5, 2\) and B \(1, 2, 5\), expected"):
        train_adapters(optax.sgd(1.0), {"q": Adapter(weight, a, b[..., 1:])})
    biased = find_sites(network, params, x)["q"].weight
    with pytest.raises(ValueError, match="'q' has a bias's row; give it the weight's `kernel`"):
        train_adapters(optax.sgd(1.0), {"q": Adapter(biased, a, b)})
    with pytest.raises(ValueError, match=r"directions of shape \(1, 5, 2\), expected \(1, 6, k\)"):
        train_adapters(optax.sgd(1.0), {"q": Adapter(weight, a, b, a)})
    with pytest.raises(ValueError, match="several adapters of 'q' overlap"):
        train_adapters(optax.sgd(1.0), dict.fromkeys("xy", Adapter(weight, a, b)))
    with pytest.raises(ValueError, match="no leaf 'q', which the adapters covers"):
        _update_without_q(Adapter(weight, a, b), {"o": params["o"]})
    adapted = with_lora(network, params, x, rank=2, key=key)
    with pytest.raises(ValueError, match=r"\['c'\] have no adapters"):
        adapted.start({"c": pairs["q"]})
    with pytest.raises(ValueError, match=r"'q' has shapes \(5, 2\) and \(2, 4\), expected"):
        adapted.start({"q": (pairs["q"][0], pairs["o"][1])})
