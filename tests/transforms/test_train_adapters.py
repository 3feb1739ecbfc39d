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


def test_what_is_no_adapter_is_refused(scene, key):
    params, x, _, pairs, _ = scene
    weight = find_sites(network, params, x)["q"].weight.kernel
    a, b = (one[None] for one in pairs["q"])
    with pytest.raises(ValueError, match="no adapters"):
        train_adapters(optax.sgd(1.0), {})
    with pytest.raises(ValueError, match=r"'q' has A \(1, 5, 2\) and B \(1, 2, 5\), expected"):
        train_adapters(optax.sgd(1.0), {"q": Adapter(weight, a, b[..., 1:])})
    with pytest.raises(ValueError, match="no leaf 'q', which the adapters covers"):
        train_adapters(optax.sgd(1.0), {"q": Adapter(weight, a, b)}).init({"o": params["o"]})
    adapted = with_lora(network, params, x, rank=2, key=key)
    with pytest.raises(ValueError, match=r"\['c'\] have no adapters"):
        adapted.start({"c": pairs["q"]})
    with pytest.raises(ValueError, match=r"'q' has shapes \(5, 2\) and \(2, 4\), expected"):
        adapted.start({"q": (pairs["q"][0], pairs["o"][1])})
