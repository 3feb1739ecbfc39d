"""Which addition is a weight's bias and which is not, and what a gain multiplies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tracing.oracle import check_capture, normal

X = normal(2, 3, 4)
FUSED, ALONE = {"b": {"dense"}}, {"b": {"bias"}}


def params(**shapes):
    return {name: normal(*shape) for name, shape in {"w": (4, 5), "b": (5,), **shapes}.items()}


FUSING = {
    "plain": lambda p, x: x @ p["w"] + p["b"],
    "from the left": lambda p, x: p["b"] + x @ p["w"],
    "subtracted": lambda p, x: x @ p["w"] - p["b"],
    "scaled": lambda p, x: x @ (2 * p["w"]) + 3 * p["b"] / 7,
    "negated and shifted": lambda p, x: x @ p["w"] + (1 - p["b"]),
    "kept axes": lambda p, x: x @ p["w"] + p["b"][None, None],
    "cast": lambda p, x: (x @ p["w"]).astype(jnp.float32) + p["b"].astype(jnp.float32),
    "flat batch": lambda p, x: (x @ p["w"]).reshape(-1, 5) + p["b"],
    "transposed": lambda p, x: jnp.swapaxes(x @ p["w"], 1, 2) + p["b"][:, None],
    "inside jit": lambda p, x: jax.jit(lambda h, b: h + b)(x @ p["w"], p["b"]),
    "out of jit": lambda p, x: jax.jit(lambda x, w: x @ w)(x, p["w"]) + p["b"],
    "under vmap": lambda p, x: jax.vmap(jax.vmap(lambda v: p["w"].T @ v + p["b"]))(x),
    "output used after the bias": lambda p, x: (lambda h: h * jnp.tanh(h))(x @ p["w"] + p["b"]),
    "residual after the bias": lambda p, x: x[..., :1] + (x @ p["w"] + p["b"]),
}


@pytest.mark.parametrize("name", FUSING)
def test_fused(name):
    apply = FUSING[name]
    tol = 1e-5 if name == "cast" else None
    sites = check_capture(lambda p, x: jnp.tanh(apply(p, x)), params(), X, kinds=FUSED, tol=tol)
    assert sites["w"].weight.bias_path == "b"
    assert sites["w"].weight.rows == 5
    assert len(sites) == 1


NOT_FUSED = {
    "the bare output is used too": lambda p, x: (lambda h: (h + p["b"]) * h)(x @ p["w"]),
    "the bare output is returned too": lambda p, x: (lambda h: jnp.stack([h, h + p["b"]]))(
        x @ p["w"]
    ),
    "another term came before": lambda p, x: (x @ p["w"] + x[..., :1]) + p["b"],
    "a factor came before": lambda p, x: 2 * (x @ p["w"]) + p["b"],
    "a nonlinearity came before": lambda p, x: jnp.tanh(x @ p["w"]) + p["b"],
    "the output is subtracted": lambda p, x: p["b"] - x @ p["w"],
    "used twice inside jit": lambda p, x: jax.jit(lambda h, g, b: (h + b) * g)(
        *(lambda h: (h, h))(x @ p["w"]), p["b"]
    ),
    "shared by two weights": lambda p, x: (x @ p["w"] + p["b"]) * jnp.tanh(x @ p["v"] + p["b"]),
    "used again elsewhere": lambda p, x: (x @ p["w"] + p["b"]) * jnp.tanh(x[..., :1] + p["b"]),
    "one weight, a bias once": lambda p, x: (x @ p["w"] + p["b"]) * (jnp.sin(x) @ p["w"]),
    "added twice": lambda p, x: (x @ p["w"] + p["b"]) + p["b"],
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_not_fused(name):
    apply = NOT_FUSED[name]
    shapes = {"v": (4, 5)} if "two weights" in name else {}
    check_capture(lambda p, x: jnp.sin(apply(p, x)), params(**shapes), X, kinds=ALONE)


def test_one_weight_with_two_biases():
    def apply(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]) * (jnp.sin(x) @ p["w"] + p["c"])

    check_capture(apply, params(c=(5,)), X, kinds={"b": {"bias"}, "c": {"bias"}})


def test_one_weight_and_its_bias_used_twice_stay_together():
    def layer(p, x):
        return jnp.tanh(x @ p["w"] + p["b"])

    p = {"w": normal(4, 4), "b": normal(4)}
    sites = check_capture(lambda p, x: layer(p, layer(p, x)), p, X, kinds=FUSED)
    assert set(sites) == {"w", "w#1"}


def test_of_two_biases_the_first_is_fused():
    def apply(p, x):
        return jnp.tanh(x @ p["w"] + p["b"] + p["c"])

    check_capture(apply, params(c=(5,)), X, kinds={"b": {"dense"}, "c": {"bias"}})


def test_two_biases_added_to_each_other_are_uncovered():
    def apply(p, x):
        return jnp.tanh(x @ p["w"] + (p["b"] + p["c"]))

    sites = check_capture(apply, params(c=(5,)), X, uncovered=("b", "c"))
    assert "enters `add` with another parameter" in sites.uncovered["b"]


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (2, 3, 1), (3, 1), (), (1,), (2, 3, 5)])
def test_other_shapes_are_sites_of_their_own(shape):
    check_capture(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), params(b=shape), X, kinds=ALONE)


def test_a_bias_of_two_axes():
    def apply(p, x):
        return jnp.tanh(jnp.einsum("btd,dhk->bthk", x, p["w"]) + p["b"])

    check_capture(apply, params(w=(4, 2, 3), b=(2, 3)), X, kinds=FUSED)


def reordered(order):
    def apply(p, x):
        h = jnp.einsum("btd,dijk->btijk", x, p["w"])
        h = jnp.transpose(h, (0, 1, *(2 + i for i in order)))
        return jnp.tanh(h.reshape(2, 3, h.shape[2] * h.shape[3], h.shape[4]) + p["b"])

    return apply


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)]
)
def test_a_bias_in_another_order_than_the_weight_is_not_mistaken(order):
    # Fusing with axes 0 and 2 merged would take entries of the wrong rows.
    sizes = [(2, 3, 5)[i] for i in order]
    shapes = {"w": (4, 2, 3, 5), "b": (sizes[0] * sizes[1], sizes[2])}
    kinds = FUSED if order == (0, 1, 2) else ALONE
    check_capture(reordered(order), params(**shapes), X, kinds=kinds)


def test_a_bias_of_equal_sizes_in_another_order():
    def apply(p, x):
        h = jnp.einsum("btd,dhk->btkh", x, p["w"])
        return jnp.tanh(h + p["b"])

    check_capture(apply, params(w=(4, 3, 3), b=(3, 3)), X, kinds=ALONE)


def test_a_batched_weight_with_its_bias():
    def apply(p, x):
        return jnp.tanh(jnp.einsum("ebd,edf->bef", x, p["w"]) + p["b"])

    sites = check_capture(apply, params(w=(2, 4, 5), b=(2, 5)), X, kinds=FUSED)
    assert sites["w"].weight.layers == 2


SCALES = {
    "vector": ((4,), lambda p, x: x * p["g"]),
    "one plus": ((4,), lambda p, x: (1 + p["g"]) * x),
    "per position": ((3, 1), lambda p, x: x * p["g"]),
    "per head": ((2,), lambda p, x: x.reshape(2, 3, 2, 2) * p["g"][:, None]),
    "scalar": ((), lambda p, x: p["g"] * jnp.sin(x)),
    "of one entry": ((1, 1), lambda p, x: p["g"] * x),
    "whole": ((2, 3, 4), lambda p, x: x * p["g"]),
    "of a broadcast activation": ((4,), lambda p, x: x.mean(-1, keepdims=True) * p["g"]),
    "of a scalar activation": ((4,), lambda p, x: jnp.vdot(x, x) * p["g"]),
    "reversed axes": ((4, 3), lambda p, x: x * p["g"].T),
    "scaled": ((4,), lambda p, x: x * (p["g"] * 3 - 1) / 2),
    "negated": ((4,), lambda p, x: x * -p["g"]),
}


@pytest.mark.parametrize("name", SCALES)
def test_scale(name):
    shape, apply = SCALES[name]
    sites = check_capture(
        lambda p, x: jnp.tanh(apply(p, x)), {"g": normal(*shape)}, X, kinds={"g": {"scale"}}
    )
    assert sites["g"].weight.d_out == np.prod(shape, dtype=int)


def test_a_norm_with_gain_and_shift():
    def apply(p, x):
        y = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        return jnp.tanh((y * p["g"] + p["s"]) @ p["w"] + p["b"])

    kinds = {"g": {"scale"}, "s": {"bias"}, "b": {"dense"}}
    check_capture(apply, params(g=(4,), s=(4,)), X, kinds=kinds)


def test_a_shape_of_a_parameter_that_is_only_used_for_its_size():
    check_capture(lambda p, x: x @ p["w"] * p["b"].shape[0], params(), X, uncovered=("b",))
