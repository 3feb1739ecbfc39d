"""Sites under jit, remat, cond and scan, nested; what is shared between them and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jedit.tracing import capture, run_capture
from tests.tracing.oracle import as_users_write, assert_close, check_capture, normal, user_rules

X = normal(2, 3, 4)


def layers(n=3, *lead):
    shapes = {"q": (4, 4), "k": (4, 4), "b": (4,), "g": (4,)}
    return {name: normal(*lead, n, *shape) for name, shape in shapes.items()}


def block(h, p):
    query, key = h @ p["q"] + p["b"], h @ p["k"]
    return h + jnp.tanh(query * p["g"]) * jax.nn.sigmoid(key)


def step(h, p):
    return block(h, p), None


WRAPPED = {
    "plain": step,
    "remat": jax.checkpoint(step),
    "remat with policy": jax.checkpoint(step, policy=jax.checkpoint_policies.dots_saveable),
    "jit": jax.jit(step),
    "remat in jit": jax.jit(jax.checkpoint(step)),
    "jit in remat": jax.checkpoint(jax.jit(step), prevent_cse=False),
}


@pytest.mark.parametrize("is_outer_jit", [False, True])
@pytest.mark.parametrize("body", WRAPPED)
def test_scanned_layers(body, is_outer_jit):
    def apply(params, x):
        return lax.scan(WRAPPED[body], x, params)[0]

    sites = check_capture(
        jax.jit(apply) if is_outer_jit else apply,
        layers(),
        X,
        kinds={"b": {"dense"}, "g": {"scale"}},
    )
    assert {s.weight.layers for s in sites.values()} == {3}
    assert sites["q"].record == sites["k"].record
    assert sites["q"].input_shape == (3, 2, 3, 4)


@pytest.mark.parametrize("options", [{"reverse": True}, {"unroll": 2}, {"unroll": True}])
def test_scan_options(options):
    check_capture(lambda p, x: lax.scan(step, x, p, **options)[0], layers(), X)


def test_scan_of_scans_of_layers():
    def apply(params, x):
        def outer(h, p):
            h, _ = lax.scan(jax.checkpoint(step), h, p["inner"])
            return jnp.tanh(h @ p["w"]), None

        return lax.scan(outer, x, params)[0]

    params = {"inner": layers(3, 2), "w": normal(2, 4, 4)}
    sites = check_capture(apply, params, X)
    assert sites["inner/q"].weight.layers == 6
    assert sites["w"].weight.layers == 2


def test_a_layer_stack_run_again_and_again():
    def apply(params, x):
        def again(h, _):
            return lax.scan(step, h, params)[0], None

        return lax.scan(again, x, None, length=2)[0]

    sites = check_capture(apply, layers(), X)
    assert sites["q"].num_uses == 2
    assert sites["q"].weight.layers == 3


def test_layers_laid_out_scaled_and_sliced_before_the_scan():
    def apply(params, x):
        stack = {"w": jnp.moveaxis(params["w"], 2, 0)[1:] / 2, "b": params["b"].T[:2]}

        def layer(h, p):
            return jnp.tanh(h @ p["w"] + p["b"]), h

        h, trace = lax.scan(layer, x, stack)
        return h + trace.sum(0)

    sites = check_capture(apply, {"w": normal(4, 4, 3), "b": normal(4, 3)}, X)
    assert sites["w"].weight.layers == 2


def test_a_bias_broadcast_before_the_scan():
    def apply(params, x):
        bias = jnp.broadcast_to(params["b"][:, None], (2, 3, 4))
        gain = jnp.broadcast_to(params["g"], (2, 4))

        def layer(h, p):
            return jnp.tanh((h @ params["w"] + p[0]) * p[1]), None

        return lax.scan(layer, x, (bias, gain))[0]

    params = {"b": normal(2, 4), "g": normal(4), "w": normal(4, 4)}
    sites = check_capture(apply, params, X)
    assert sites["b"].weight.layers == 2
    assert sites["g"].num_uses == 2


def test_a_scan_of_length_one():
    def apply(params, x):
        bias = jnp.broadcast_to(params["b"], (1, 2, 3, 4))
        return lax.scan(lambda h, p: (jnp.tanh(h @ p[0] + p[1]), None), x, (params["w"], bias))[0]

    check_capture(apply, {"w": normal(1, 4, 4), "b": normal(4)}, X)


def test_lstm():
    def apply(params, x):
        def cell(carry, now):
            h, c = carry
            gates = now @ params["wx"] + h @ params["wh"] + params["b"]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g) + params["peep"] * c
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((2, 5), x.dtype)
        _, hs = lax.scan(cell, (zero, zero), jnp.swapaxes(x, 0, 1))
        return hs @ params["out"]

    params = {
        "wx": normal(4, 20),
        "wh": normal(5, 20),
        "b": normal(20),
        "peep": normal(5),
        "out": normal(5, 2),
    }
    sites = check_capture(apply, params, X, kinds={"b": {"bias"}, "peep": {"scale"}})
    assert sites["wh"].num_uses == 3
    assert not sites["wh"].weight.is_stacked


def test_fori_loop_of_static_length():
    def apply(params, x):
        return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params["w"]), x)

    assert check_capture(apply, {"w": normal(4, 4)}, X)["w"].num_uses == 3


def test_weights_carried_unchanged_and_constants_closed_over():
    def apply(params, x):
        half = jnp.asarray(0.5, x.dtype)

        def body(carry, _):
            h, w = carry
            return (jnp.tanh(h @ (w * half)), w), None

        return lax.scan(body, (x, params["w"]), None, length=2)[0][0]

    sites = check_capture(apply, {"w": normal(4, 4)}, X)
    assert sites["w"].scale == 0.5


def test_parameters_a_loop_changes_or_returns_are_uncovered():
    def apply(params, x):
        def body(carry, p):
            h, u = carry
            return (jnp.tanh(h @ u @ p), u * 0.9), params["y"]

        (h, _), ys = lax.scan(body, (x, params["u"]), params["w"])
        return h @ ys[0]

    params = {"u": normal(4, 4), "w": normal(2, 4, 4), "y": normal(4, 4)}
    sites = check_capture(apply, params, X, uncovered=("u", "y"))
    assert "changed by a loop that carries it" in sites.uncovered["u"]
    assert "returned by a loop's body" in sites.uncovered["y"]


def branchy(params, x):
    def left(h):
        return jnp.tanh(h @ params["a"] + params["b"])

    def right(h):
        return lax.scan(lambda h, w: (jnp.sin(h @ w), None), h, params["c"])[0]

    return lax.cond(x.sum() > 0, left, right, x)


BRANCHES = {"a": normal(4, 4), "b": normal(4), "c": normal(2, 4, 4)}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_branch_not_taken_gives_zero(sign):
    x = sign * np.abs(X)
    check_capture(branchy, BRANCHES, x, kinds={"b": {"dense"}})
    captured = run_capture(as_users_write(branchy), BRANCHES, x)
    gradients = captured.pullback(jnp.ones_like(captured.outputs))
    site_a, site_c = captured.sites["a"], captured.sites["c"]
    assert float(captured.ran[site_a.branch]) == (sign > 0)
    assert float(captured.ran[site_c.branch]) == (sign < 0)
    idle = "c" if sign > 0 else "a"
    assert not jnp.any(gradients[idle])
    assert not jnp.any(captured.activations[idle])


def test_switch_of_three_branches_inside_a_scan_inside_a_remat():
    def apply(params, x):
        def layer(h, p):
            index, w = p
            branches = [lambda h: jnp.tanh(h @ w), lambda h: h @ params["v"], lambda h: h * 2.0]
            return lax.switch(index, branches, h), None

        scan = jax.checkpoint(lambda p, x: lax.scan(layer, x, (jnp.arange(4) % 3, p))[0])
        return scan(params["w"], x)

    params = {"w": normal(4, 4, 4), "v": normal(4, 4)}
    sites = check_capture(apply, params, X)
    assert sites["w"].weight.layers == 4
    captured = run_capture(apply, params, X)
    np.testing.assert_array_equal(captured.ran[sites["w"].branch], [1, 0, 0, 1])


def test_cond_inside_cond():
    def apply(params, x):
        def inner(h):
            return lax.cond(h[0, 0, 0] > 0, lambda h: h @ params["a"], lambda h: h @ params["b"], h)

        return lax.cond(x.sum() > 0, inner, lambda h: jnp.sin(h @ params["c"]), x)

    params = {name: normal(4, 4, seed=i) for i, name in enumerate("abc")}
    for sign in (1.0, -1.0):
        check_capture(apply, params, sign * np.abs(X))


def test_a_cond_that_vmap_turns_into_a_selection_is_reported():
    # With a batched predicate vmap selects among the operands themselves, parameters included.
    apply = jax.vmap(branchy, in_axes=(None, 0))
    sites = check_capture(apply, BRANCHES, X, uncovered=("a", "b", "c"))
    assert "enters `select_n`" in sites.uncovered["a"]


def test_parameters_that_decide_or_leave_a_cond_are_uncovered():
    def apply(params, x):
        w = lax.cond(x.sum() > 0, lambda: params["a"], lambda: params["b"])
        h = lax.cond(params["t"][0] > 0, jnp.sin, jnp.cos, x @ w)
        return h @ params["v"]

    params = {"a": normal(4, 4), "b": normal(4, 4), "t": normal(2), "v": normal(4, 2)}
    sites = check_capture(apply, params, X, uncovered=("a", "b", "t"))
    assert "returned by a branch of `cond`" in sites.uncovered["a"]
    assert "no gradient" in sites.uncovered["t"]


def test_sharing_reaches_across_jit_and_remat():
    def apply(params, x):
        h = jnp.sin(x)
        query = jax.jit(lambda h, w: h @ w)(h, params["q"])
        key = jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(h, params["k"])
        value = jax.checkpoint(lambda h, w: jnp.cos(h.astype(h.dtype) @ w))(h, params["v"])
        return query * key + value + h @ params["o"]

    params = {name: normal(4, 4, seed=i) for i, name in enumerate("qkvo")}
    sites = check_capture(apply, params, X)
    assert len({site.record for site in sites.values()}) == 1
    captured = jax.make_jaxpr(lambda p, x: capture(apply, p, x)[:2])(params, X)
    assert len(set(captured.jaxpr.outvars[1:])) == 1


def test_different_activations_of_equal_shape_are_not_shared():
    def apply(params, x):
        h = x
        for name in "abc":
            h = jnp.sin(h @ params[name]) + x
        return h + (x.T.T @ params["d"]) + x.reshape(2, 3, 4) @ params["e"] + x[::-1] @ params["f"]

    params = {name: normal(4, 4, seed=i) for i, name in enumerate("abcdef")}
    sites = check_capture(apply, params, X)
    assert len({sites[name].record for name in "abcf"}) == 4
    assert sites["a"].record == sites["e"].record


def test_equal_numbers_in_different_loops_are_different_records():
    def apply(params, x):
        def body(h, w):
            return jnp.tanh(h @ w + x @ params["u"]), None

        return lax.scan(body, x, params["a"])[0] + lax.scan(body, x, params["b"])[0]

    params = {"a": normal(2, 4, 4), "b": normal(3, 4, 4), "u": normal(4, 4)}
    sites = check_capture(apply, params, X)
    assert [site.num_uses for site in sites.values() if site.path == "u"] == [2, 3]


def test_an_optimization_barrier_of_several_operands_is_transparent():
    def apply(params, x):
        h, w, g = lax.optimization_barrier((jnp.sin(x), params["w"], params["g"]))
        return (h @ w + params["b"]) * g

    params = {"w": normal(4, 4), "b": normal(4), "g": normal(4)}
    check_capture(apply, params, X, kinds={"b": {"dense"}, "g": {"scale"}})


def test_checkpoint_names_and_their_policy_are_kept():
    from jax.ad_checkpoint import checkpoint_name

    policy = jax.checkpoint_policies.save_only_these_names("kept")

    def apply(params, x):
        def body(h, w):
            return jnp.sin(checkpoint_name(h @ w, "kept") + params["b"])

        h = jax.checkpoint(body, policy=policy)(x, params["w"])
        return checkpoint_name(h, "out") @ params["v"]

    params = {"w": normal(4, 4), "b": normal(4), "v": normal(4, 2)}
    check_capture(apply, params, X, kinds={"b": {"dense"}})


def test_activations_of_a_scan_are_the_layers_own():
    stack = layers()
    apply = as_users_write(lambda p, x: lax.scan(step, x, p)[0])
    captured = run_capture(apply, stack, X)
    with user_rules():
        h, expected = jnp.asarray(X), []
        for i in range(3):
            expected.append(h)
            h = block(h, {name: leaf[i] for name, leaf in stack.items()})
    assert_close(captured.activations["q"], jnp.stack(expected), 1e-5)
