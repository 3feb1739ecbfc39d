"""Parameters put together when the model is called: each leaf has its window of an equation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jedit.tracing import capture, find_sites, intervene
from tests.tracing.oracle import as_users_write, assert_close, check_capture, normal

X = normal(2, 3, 4)
W = {"q": normal(4, 4), "k": normal(4, 2, seed=1), "v": normal(4, 2, seed=2)}
SQUARE = {"a": normal(4, 4), "b": normal(4, 4, seed=1), "c": normal(4, 4, seed=2)}


def parts(y):
    q, k, v = jnp.split(y, [4, 6], axis=-1)
    return jnp.sin(q) + jnp.tanh(jnp.concatenate([k, v], axis=-1))


def heads(p, x):
    joined = jnp.concatenate([p["q"], p["k"], p["v"]], axis=1).reshape(4, 4, 2)
    return parts(jnp.einsum("btd,dhk->bthk", x, joined / 2).reshape(2, 3, 8))


def turned(p, x):
    joined = jnp.concatenate([w.T for w in (p["q"], p["k"], p["v"])]).astype(x.dtype)
    return parts(jnp.einsum("od,btd->bto", joined, x))


def nested(p, x):
    left = jnp.concatenate([p["q"], jnp.concatenate([p["k"], p["v"]], axis=1)], axis=1)
    return parts(x @ -left)


def with_zeros(p, x):
    joined = jnp.concatenate([p["q"], jnp.zeros((4, 3)), p["k"], p["v"]], axis=1)
    return parts((x @ joined)[..., np.array([0, 1, 2, 3, 7, 8, 9, 10])])


def cut_again(p, x):
    joined = jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
    return parts(jnp.concatenate([x @ joined[:, :5], x @ joined[:, 5:]], axis=-1))


def plain(p, x):
    return parts(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1))


@pytest.mark.parametrize("apply", [plain, heads, turned, nested, with_zeros, cut_again])
def test_columns_of_one_product(apply):
    sites = check_capture(apply, W, X, kinds=dict.fromkeys(W, {"dense"}))
    assert len({site.probe for site in sites.values()}) == 1 + (apply is cut_again)
    assert len({site.shared_input for site in sites.values()}) == 1
    assert (sites["k"].weight.d_in, sites["q"].weight.d_out) == (4, 4)


def test_rows_of_one_product():
    def apply(p, x):
        h = jnp.concatenate([x, jnp.sin(x)[..., :2]], axis=-1)
        return jnp.tanh(h @ jnp.concatenate([p["a"], p["b"][:2]]))

    sites = check_capture(apply, {n: SQUARE[n] for n in "ab"}, X)
    assert sites["a"].record == sites["b"].record
    assert sites["a"].shared_input != sites["b"].shared_input
    assert sites["b"].input_shape == (2, 3, 2)


def stacked(p):
    return jnp.stack([p["a"], p["b"], p["c"]])


def scanned(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stacked(p))[0]


def scanned_in_reverse_and_recomputed(p, x):
    step = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return lax.scan(step, x, stacked(p), reverse=True)[0]


def scanned_vectors(p, x):
    def step(h, g):
        return jnp.tanh(h * g[0] + g[1]), None

    return lax.scan(step, x, stacked(p))[0]


def batched(p, x):
    h = jnp.stack([x, jnp.sin(x), jnp.cos(x)])
    return jnp.einsum("kbtd,kde->bte", h, stacked(p))


def spread(p, x):
    return jnp.einsum("btd,kde->btke", x, stacked(p)).sum(-2) ** 2


def vmapped(p, x):
    return jax.vmap(lambda w, x: jnp.tanh(x @ w), (0, None))(stacked(p), x).sum(0)


def unrolled(p, x):
    all_three = stacked(p)
    return jnp.tanh(x @ all_three[0] + jnp.sin(x @ all_three[1])) @ all_three[2]


def taken_apart(p, x):
    whole = jnp.stack([p["a"], p["b"], p["c"]], axis=-1)
    for w in jnp.unstack(whole.swapaxes(0, 1), axis=2):
        x = jnp.tanh(x @ w)
    return x


def joined_stacks(p, x):
    whole = jnp.concatenate([p["a"].reshape(2, 2, 4), p["b"].reshape(2, 2, 4)])
    return lax.scan(lambda h, w: (jnp.tanh(h[..., :2] @ w), None), x, whole)[0] @ p["c"]


@pytest.mark.parametrize(
    "apply",
    [
        scanned,
        scanned_in_reverse_and_recomputed,
        scanned_vectors,
        batched,
        spread,
        vmapped,
        unrolled,
        taken_apart,
        joined_stacks,
    ],
)
def test_stacked_when_called(apply):
    sites = check_capture(apply, SQUARE, X)
    if apply is scanned:
        assert [site.weight.layers for site in sites.values()] == [1, 1, 1]
        assert {site.output_shape for site in sites.values()} == {(1, 2, 3, 4)}
    if apply is joined_stacks:
        assert sites["b"].weight.layers == 2


def test_gains_and_biases_put_together():
    def apply(p, x):
        y = x * jnp.concatenate([p["g"], p["h"]]) + jnp.concatenate([p["b"], p["c"]])
        return jnp.tanh(y) @ p["w"] + jnp.concatenate([p["b"], p["c"]])

    params = {n: normal(2, seed=i) for i, n in enumerate("ghbc")} | {"w": normal(4, 4)}
    kinds = {"g": {"scale"}, "h": {"scale"}, "b": {"bias"}, "w": {"dense"}}
    check_capture(apply, params, X, kinds=kinds)


def tokens(p, x):
    first = jnp.broadcast_to(p["token"], (len(x), 1, 4))
    return jnp.tanh(jnp.concatenate([first, x @ p["w"]], axis=1)) @ p["w"]


def prompt(p, x):
    return jax.vmap(lambda x: jnp.tanh(jnp.concatenate([p["prompt"], x @ p["w"]])) @ p["w"])(x)


def tiled(p, x):
    first = jnp.tile(p["token"], (len(x), 1, 1))
    return jnp.tanh(jnp.concatenate([first, x @ p["w"]], axis=1))


def several(p, x):
    both = jnp.concatenate([p["token"], p["prompt"][None]], axis=1)
    both = jnp.broadcast_to(both, (len(x), *both.shape[1:]))
    return jnp.tanh(jnp.concatenate([x @ p["w"], both * 2], axis=1))


@pytest.mark.parametrize("apply", [tokens, prompt, tiled, several])
def test_parameters_that_join_the_activations(apply):
    params = {"token": normal(1, 1, 4), "prompt": normal(2, 4), "w": normal(4, 4)}
    if apply is not several:
        del params["token" if apply is prompt else "prompt"]
    kinds = dict.fromkeys(set(params) - {"w"}, {"bias"})
    check_capture(apply, params, X, kinds={**kinds, "w": {"dense"}})


class ClassToken(eqx.Module):
    token: jax.Array
    attention: eqx.nn.MultiheadAttention

    def __init__(self, key):
        self.token = jnp.ones((1, 4))
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=key)

    def __call__(self, x):
        x = jnp.concatenate([self.token, x])
        return self.attention(x, x, x)[0]


def test_a_class_token_of_equinox():
    params, static = eqx.partition(ClassToken(jax.random.key(0)), eqx.is_array)
    params = jax.tree.map(lambda x: normal(*x.shape), params)
    check_capture(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, X)


def test_interventions_at_windows():
    apply = as_users_write(plain)
    x, params = jnp.asarray(X), jax.tree.map(jnp.asarray, W)
    outputs, activations, _ = capture(apply, params, x)
    sites = find_sites(apply, params, x)
    key = jnp.asarray(normal(2, 3, 2, seed=7))
    mask = jnp.ones((1, 3, 1), bool)
    found = intervene(apply, params, x, add={"q": jnp.ones(4, x.dtype)}, replace={"k": (mask, key)})
    assert_close(found.site_outputs["k"], key, 1e-7)
    assert_close(found.site_outputs["v"], x @ params["v"], 1e-6)
    assert_close(found.site_outputs["q"], x @ params["q"] + 1, 1e-6)
    assert found.outputs.shape == outputs.shape
    assert activations["v"].shape == sites["v"].input_shape
    assert_close(found.activations["v"], x, 0)


def test_what_is_joined_and_cannot_be_followed():
    def apply(p, x):
        kernel = jnp.concatenate([p["a"][None], p["b"][None]], axis=2)
        y = lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return y @ jnp.tanh(jnp.concatenate([p["c"], p["c"]]))

    sites = check_capture(apply, SQUARE, X, uncovered=tuple("abc"))
    assert "is joined with other parameters before it enters `conv" in sites.uncovered["b"]
    assert "is joined with other parameters before it enters `tanh`" in sites.uncovered["c"]
    assert "(test_joined.py:" in sites.uncovered["c"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_stack_taken_apart_in_a_branch(sign):
    def apply(p, x):
        return lax.cond(sign * x[0, 0, 0] > 0, lambda x: scanned(p, x), jnp.sin, x)

    check_capture(apply, SQUARE, X)


def test_a_stack_taken_apart_around_a_branch():
    def apply(p, x):
        def step(h, w):
            return lax.cond(h[0, 0, 0] > 0, lambda h: jnp.tanh(h @ w), jnp.sin, h), None

        return lax.scan(step, x, stacked(p))[0]

    sites = check_capture(apply, SQUARE, X, uncovered=tuple("abc"))
    assert "scanned with a `cond` that reads it" in sites.uncovered["a"]
