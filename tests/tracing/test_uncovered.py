"""What cannot be captured is named, with reason and line; custom derivatives stay in force."""

import inspect

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jedit.tracing import capture, find_sites
from tests.tracing.oracle import as_users_write, check_capture, normal

X = normal(2, 3, 4)
W = {"w": normal(4, 4), "v": normal(4, 4, seed=1)}


@jax.custom_vjp
def sign_straight_through(x):
    return jnp.sign(x)


sign_straight_through.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (g,))


@jax.custom_jvp
def steep(x):
    return jnp.tanh(x)


steep.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 7.0 * tangents[0]))


@pytest.mark.parametrize("activation", [sign_straight_through, steep, jax.nn.relu, jax.nn.silu])
def test_custom_rules_stay_in_force(activation):
    def apply(params, x):
        return activation(x @ params["w"]) @ params["v"]

    check_capture(apply, W, X)
    check_capture(jax.jit(jax.checkpoint(apply)), W, X)


def test_the_gradient_of_a_straight_through_estimator_is_its_own():
    def apply(params, x):
        return sign_straight_through(x @ params["w"])

    x = jnp.asarray(X)
    _, _, pullback = capture(as_users_write(apply), {"w": W["w"]}, x)
    np.testing.assert_array_equal(pullback(x)["w"], x)  # the true derivative is zero


@jax.custom_vjp
def custom_linear(x, w):
    return x @ w


custom_linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


@jax.custom_jvp
def custom_norm(x, g):
    return x * g


custom_norm.defjvp(lambda p, t: (p[0] * p[1], t[0] * p[1] + p[0] * t[1]))


def in_while(params, x):
    def body(carry):
        return carry[0] + 1, jnp.tanh(lax.stop_gradient(carry[1]) @ params["w"])

    return lax.while_loop(lambda carry: carry[0] < 2, body, (0, x))[1]


def at_run_time(params, x):
    i = jnp.argmax(x[0, 0])
    return x @ lax.dynamic_slice_in_dim(params["w"], i % 2, 2, axis=1)


REASONS = {
    "custom_vjp": (
        lambda p, x: jax.vmap(custom_linear, (0, None))(x, p["w"]),
        "custom derivative rule",
    ),
    "custom_jvp": (lambda p, x: custom_norm(x, p["w"][0]), "custom derivative rule"),
    "dynamic slice": (at_run_time, "sliced at an index known only at run time"),
    "norm": (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])), "enters `mul` with itself"),
    "weight norm": (
        lambda p, x: x @ (p["w"] * lax.rsqrt(jnp.sum(p["v"] ** 2))),
        "is multiplied by an array that does not depend on the inputs",
    ),
    "sparse": (
        lambda p, x: x @ (p["w"] * np.triu(np.ones((4, 4)))),
        "is multiplied by an array that does not depend on the inputs",
    ),
    "low rank": (lambda p, x: x @ (p["w"] @ p["v"]), "contracted with another parameter"),
    "function": (lambda p, x: x @ jnp.tanh(p["w"]), "enters `tanh`"),
    "division": (lambda p, x: x / jnp.exp(p["w"][0]) + x / p["w"][1], "enters `exp`"),
    "divisor": (lambda p, x: x / p["w"][0], "divides, or is divided by, an activation"),
    "concatenation": (
        lambda p, x: jnp.concatenate([p["w"], p["v"]])[x[..., 0].astype(jnp.int32)],
        "is joined with other parameters before it enters `gather`",
    ),
    "sum": (lambda p, x: x * jnp.sum(p["w"]), "enters `reduce_sum`"),
    "broadcast first": (
        lambda p, x: jnp.einsum("bij,bjk->bik", x, jnp.broadcast_to(p["w"], (2, 4, 4))),
        "is broadcast before it is contracted",
    ),
    "ragged": (
        lambda p, x: lax.ragged_dot(x[0], p["w"].reshape(2, 4, 2), jnp.array([1, 2])),
        "enters `ragged_dot`: its rows are known only at run time",
    ),
    "complex activation": (lambda p, x: jnp.abs(jnp.exp(1j * x) @ p["w"]), "complex numbers"),
    "complex bias": (lambda p, x: jnp.abs(x @ p["v"] + 1j * p["w"][0]), "complex numbers"),
    "complex weight": (lambda p, x: (x @ lax.complex(p["w"], p["w"])).imag, "complex numbers"),
    "complex gain": (lambda p, x: jnp.fft.fft(x * p["v"][0]).real @ p["w"] ** 2, "enters `"),
    "complex table": (
        lambda p, x: jnp.abs(p["w"].astype(complex)[x[..., 0].astype(jnp.int32)]),
        "complex numbers",
    ),
    "unused": (lambda p, x: x + 0 * x @ p["v"], "is not used by apply"),
    "dead code": (lambda p, x: (x @ p["w"], x)[1], "is not used by apply"),
    "dead in jit": (lambda p, x: jax.jit(lambda x, w: (x @ w, x))(x, p["w"])[1], "is not used"),
    "dead in remat": (
        lambda p, x: jax.checkpoint(lambda x, w: (x @ w, x))(x, p["w"])[1],
        "is not used",
    ),
    "dead in scan": (
        lambda p, x: lax.scan(lambda h, _: (jnp.sin(h), h @ p["w"]), x, None, length=2)[0],
        "is not used",
    ),
    "dead in cond": (
        lambda p, x: lax.cond(x[0, 0, 0] > 0, lambda: (x, x @ p["w"]), lambda: (x, x))[0],
        "is not used",
    ),
    "stop_gradient": (lambda p, x: x @ lax.stop_gradient(p["w"]), "no gradient flows"),
    "comparison": (lambda p, x: jnp.where(p["w"][0] > 0, x, -x), "no gradient flows"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case):
    function, reason = REASONS[case]

    def apply(params, x):
        return jnp.sin(function(params, x)).mean(axis=-1, keepdims=True) * params["last"]

    sites = check_capture(apply, {**W, "last": normal(1)}, X, uncovered=None)
    assert "last" in sites
    assert reason in sites.uncovered["w"]
    if "used" not in reason and "flows" not in reason:
        assert "(test_uncovered.py:" in sites.uncovered["w"]
    assert f"  w: {sites.uncovered['w']}" in str(sites).splitlines()


def test_a_parameter_that_is_the_output():
    sites = find_sites(lambda p, _: p["w"].T, {"w": W["w"]}, X)
    assert sites.uncovered == {"w": "is returned by apply as it is"}
    assert len(sites) == 0


def test_a_while_loop_is_the_reason():
    sites = find_sites(as_users_write(in_while), {"w": W["w"]}, X)
    assert "enters a `while` loop, which has no reverse mode" in sites.uncovered["w"]
    assert "test_uncovered.py" in sites.uncovered["w"]


def test_one_bad_use_uncovers_a_parameter_whole():
    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ jnp.tanh(params["w"]) @ params["v"]

    sites = check_capture(apply, W, X, uncovered=("w",))
    assert set(sites) == {"v"}


def test_a_gradient_free_use_beside_a_site_does_no_harm():
    def apply(params, x):
        w = params["w"]
        ok = jnp.isfinite(w).all() & (w.argmax() >= 0)
        h = jnp.where(ok, x @ w + x @ lax.stop_gradient(w), 0.0)
        return h @ params["v"]

    check_capture(apply, W, X)


@pytest.mark.parametrize("kind", ["checkpointed", "bounded"])
def test_loops_of_equinox_as_diffrax_has_them(kind):
    def apply(params, x):
        def body(carry):
            return carry[0] + 1, jnp.tanh(carry[1] @ params["w"])

        start = (jnp.asarray(0), x)
        loop = eqxi.while_loop(lambda c: c[0] < 3, body, start, max_steps=4, kind=kind)
        return loop[1] @ params["v"]

    is_covered = kind == "bounded"
    sites = check_capture(apply, W, X, uncovered=() if is_covered else ("w",))
    if not is_covered:
        reason = "enters a `while` loop with a custom derivative rule; a bounded one is covered"
        assert sites.uncovered["w"].startswith(reason)


def quantized(w):
    scale = jnp.max(jnp.abs(w)) / 3
    return jnp.round(w / scale) * scale


def test_straight_through_estimators_by_stop_gradient():
    def apply(params, x):
        w, v = params["w"], params["v"]
        h = jnp.tanh(x @ (w + lax.stop_gradient(quantized(w) - w)))
        h = h + lax.stop_gradient(jax.jit(quantized)(h) - h)
        return h @ (lax.stop_gradient(jax.jit(quantized)(v)) + (v - lax.stop_gradient(v)))

    check_capture(apply, W, X, kinds={"w": {"dense"}, "v": {"dense"}})
    check_capture(jax.jit(jax.checkpoint(apply)), W, X)


def test_what_stops_in_a_scan_and_in_a_branch():
    def apply(params, x):
        def step(carry, w):
            h, norm = carry
            h = jnp.tanh(h @ (w + lax.stop_gradient(jnp.sign(w) - w)))
            return (h, norm + lax.stop_gradient(jnp.sum(jnp.exp(w)))), None

        (h, norm), _ = lax.scan(step, (x, jnp.zeros((), x.dtype)), params["w"][None])
        is_large = lax.stop_gradient(norm) > 1
        return lax.cond(is_large, lambda h: h @ params["v"], lambda h: h, h)

    check_capture(apply, W, X)


def test_the_magnitude_of_a_complex_output_keeps_its_real_weight():
    def apply(params, x):
        return jnp.abs(x @ params["v"] + 1j * params["w"][0])

    sites = check_capture(apply, W, X, uncovered=("w",))
    start = inspect.getsourcelines(apply)[1]
    assert sites.uncovered["w"].endswith(f"is covered (test_uncovered.py:{start + 1})")


def test_a_custom_rule_is_named_also_where_no_gradient_flows_back():
    def apply(params, x):
        return x @ params["v"] + lax.stop_gradient(custom_norm(x, params["w"][0]))

    sites = check_capture(apply, W, X, uncovered=("w",))
    assert "no gradient flows" in sites.uncovered["w"]


def test_the_line_is_that_of_the_users_program():
    def apply(params, x):
        first = x @ params["w"]
        return first @ jnp.exp(params["v"])

    sites = find_sites(as_users_write(apply), W, X)
    lines, start = inspect.getsourcelines(apply)
    assert len(lines) == 3
    assert sites["w"].source == f"test_uncovered.py:{start + 1}"
    assert sites.uncovered["v"].endswith(f"(test_uncovered.py:{start + 2})")


def test_the_table():
    def apply(params, x):
        ids = (x[..., 0] > 0).astype(jnp.int32)
        h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])[0]
        h = (h @ params["w"] + params["b"]) * params["g"] + params["e"][ids]
        return h @ params["e"].T + 0.0 * jnp.sum(params["bad"] ** 2)

    shapes = {"stack": (2, 4, 4), "w": (4, 5), "b": (5,), "g": (5,), "e": (2, 5), "bad": (3,)}
    params = {name: normal(*shape) for name, shape in shapes.items()}
    table = str(find_sites(as_users_write(apply), params, X)).splitlines()
    assert table[0].split() == ["parameter", "kind", "matrix", "input", "output", "uses", "where"]
    rows = [line.split()[:2] for line in table[1:6]]
    assert rows == [
        ["stack", "dense"],
        ["w", "+"],
        ["g", "scale"],
        ["e", "embedding"],
        ["e#1", "dense"],
    ]
    assert "2 x 4 -> 4" in table[1]
    assert "w + b" in table[2]
    assert table[6:8] == ["", "uncovered:"]
    assert table[8].startswith("  bad: enters `")
    assert all(line == line.rstrip() for line in table)


def message(apply, params, inputs, **more):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its text is the subject of the tests
        find_sites(as_users_write(apply), params, inputs, **more)
    with pytest.raises(ValueError, match="^.{20}"):
        capture(as_users_write(apply), params, inputs, **more)
    return str(caught.value)


@pytest.mark.parametrize("bad", [lambda y: (y, y), lambda y: {"logits": y}, lambda _: None])
def test_apply_must_return_one_array(bad):
    text = message(lambda p, x: bad(x @ p["w"]), W, X)
    assert text.startswith("apply must return one array")
    assert "wrap it" in text


def test_apply_must_return_floats():
    text = message(lambda p, x: jnp.argmax(x @ p["w"], axis=-1), W, X)
    assert "real floating-point array" in text
    assert "int" in text


def test_an_unknown_path_in_select():
    text = message(lambda p, x: x @ p["w"] @ p["v"], W, X, select=["w", "kernel$"])
    assert text == "select: 'kernel$' matches no parameter; the parameters are: v, w"


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (np.arange(3), "integer"),
        (np.ones(3, np.complex64), "complex"),
        (np.ones(3, bool), "boolean"),
        (jax.random.key(0), "non-numeric"),
    ],
)
def test_parameters_must_be_real_floats(leaf, kind):
    text = message(lambda p, x: x @ p["w"], {"w": W["w"], "state": {"count": leaf}}, X)
    assert f"parameter 'state/count' has {kind} dtype" in text
    assert "close over the others" in text


def test_inputs_whose_leading_axes_disagree():
    inputs = {"tokens": np.zeros((3, 5)), "mask": np.zeros((2, 5)), "scalar": np.zeros(())}
    text = message(lambda p, x: x["tokens"] @ p["w"], W, inputs)
    assert "the leading axes of the inputs disagree: {'mask': 2, 'tokens': 3}" in text


def test_an_unsupported_feature_is_named_with_its_line():
    sites = find_sites(as_users_write(lambda p, x: x @ jnp.sort(p["w"])), {"w": W["w"]}, X)
    assert sites.uncovered["w"].startswith("enters `sort` (test_uncovered.py:")
