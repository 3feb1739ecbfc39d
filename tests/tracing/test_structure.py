"""What capture costs and composes with: no weight gradient, remat kept, jit, vmap, bfloat16."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from jedit.tracing import capture, find_sites, run_capture, weight_gradients
from tests.tracing.oracle import TOLERANCE, as_users_write, assert_close, check_capture, normal


def equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def counts(function, *arguments):
    names = [eqn.primitive.name for eqn in equations(jax.make_jaxpr(function)(*arguments).jaxpr)]
    return {name: names.count(name) for name in set(names)}


def passes(apply):
    """The function whose jaxpr is a forward pass with capture, and its backward pass."""

    def run(params, x, cotangent):
        outputs, activations, pullback = capture(apply, params, x)
        return outputs, activations, pullback(cotangent)

    return as_users_write(lambda params, xs: run(params, *xs))


def every_kind(params, ids):
    h = params["e"][ids]
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])[0]
    h = jax.checkpoint(lambda h: jnp.tanh(h @ params["w"] + params["b"]) * params["g"])(h)
    h = lax.conv_general_dilated(
        h, params["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return h @ params["v"]


SHAPES = {
    "e": (41, 17),
    "stack": (2, 17, 17),
    "w": (17, 19),
    "b": (19,),
    "g": (19,),
    "k": (3, 19, 13),
    "v": (13, 11),
}


def test_no_weight_gradient_is_formed():
    params = {name: normal(*shape) for name, shape in SHAPES.items()}
    ids = np.arange(6).reshape(2, 3)
    check_capture(every_kind, params, ids)
    cotangent = normal(2, 3, 11)
    jaxpr = jax.make_jaxpr(passes(every_kind))(params, (ids, cotangent))
    forms = {tuple(sorted(s)) for s in SHAPES.values() if len(s) > 1} | {
        (17, 17),
        (17 * 3, 13),
        (3 * 19, 13),
    }
    produced = [
        (eqn.primitive.name, variable.aval.shape)
        for eqn in equations(jaxpr.jaxpr)
        for variable in eqn.outvars
        if eqn.primitive.name
        in ("dot_general", "conv_general_dilated", "scatter-add", "add_any", "mul")
    ]
    assert {"dot_general", "conv_general_dilated"} <= {name for name, _ in produced}
    assert not [p for p in produced if tuple(sorted(p[1])) in forms]
    # the same look at a training step does find them
    step = jax.make_jaxpr(jax.grad(as_users_write(lambda p, x: every_kind(p, x).sum())))
    shapes = {
        tuple(sorted(variable.aval.shape))
        for eqn in equations(step(params, ids).jaxpr)
        for variable in eqn.outvars
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    }
    assert (17, 19) in shapes


def two_layers(h, p):
    return jnp.tanh(jnp.tanh(h @ p["a"]) @ p["b"]), None


def two(is_scanned):
    lead = (3,) if is_scanned else ()
    return {"a": normal(*lead, 4, 5), "b": normal(*lead, 5, 4)}


def wrapped(policy, is_scanned):
    body = two_layers if policy == "none" else jax.checkpoint(two_layers, policy=policy)

    def apply(p, x):
        if not is_scanned:
            return body(x, p)[0]
        return lax.scan(body, x, p)[0]

    return apply


@pytest.mark.parametrize("is_scanned", [False, True])
def test_remat_stays_remat_policy_included(is_scanned):
    x = normal(2, 3, 4)
    found = {}
    for name, policy in [
        ("none", "none"),
        ("nothing", None),
        ("dots", jax.checkpoint_policies.dots_saveable),
        ("everything", jax.checkpoint_policies.everything_saveable),
    ]:
        apply = wrapped(policy, is_scanned)
        check_capture(apply, two(is_scanned), x)
        found[name] = counts(passes(apply), two(is_scanned), (x, x))
    assert found["none"]["tanh"] == 2
    assert found["nothing"]["tanh"] == found["dots"]["tanh"] == 4
    # With nothing saved the products are recomputed, with dots saved they are not.
    assert found["nothing"]["dot_general"] > found["dots"]["dot_general"]
    assert found["dots"]["dot_general"] == found["none"]["dot_general"]
    assert found["everything"]["tanh"] == 2


def test_a_pass_recomputes_what_the_users_own_pass_recomputes():
    def user(p, xs):
        y, vjp = jax.vjp(lambda x: wrapped(None, is_scanned=True)(p, x), xs[0])
        return y, vjp(xs[1])

    x = normal(2, 3, 4)
    mine = counts(passes(wrapped(None, is_scanned=True)), two(True), (x, x))
    assert mine["tanh"] == counts(as_users_write(user), two(True), (x, x))["tanh"]


def mlp(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


MLP = {"w": normal(4, 5), "b": normal(5), "v": normal(5, 3)}
X = normal(7, 4)


def gradients(apply, params, x, select=None):
    outputs, activations, pullback = capture(apply, params, x, select)
    sites = find_sites(apply, params, x, select)
    return weight_gradients(sites, activations, pullback(jnp.cos(outputs)))


def test_compiled_equals_eager_and_traces_once():
    traces = []

    def apply(params, x):
        traces.append(1)
        return mlp(params, x)

    apply = as_users_write(apply)
    compiled = jax.jit(lambda p, x: gradients(apply, p, x))
    first = compiled(MLP, X)
    count = len(traces)
    again = compiled(MLP, X + 1.0)
    assert len(traces) == count
    assert not np.allclose(first["w"], again["w"])
    for path, value in gradients(apply, MLP, X).items():
        assert_close(first[path], value, TOLERANCE, path)


def test_abstract_parameters_are_enough_to_find_sites():
    apply = as_users_write(mlp)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (MLP, X))
    abstract, concrete = find_sites(apply, *shapes), find_sites(apply, MLP, X)
    assert dict(abstract) == dict(concrete)
    assert str(abstract) == str(concrete)
    assert len({site.weight for site in (*abstract.values(), *concrete.values())}) == 2


def test_an_ensemble_of_captured_models_by_vmap():
    apply = as_users_write(mlp)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2.0 * leaf, -leaf]), MLP)
    together = jax.vmap(lambda p: gradients(apply, p, X))(stack)
    for i in range(3):
        alone = gradients(apply, jax.tree.map(lambda leaf, i=i: leaf[i], stack), X)
        for path, value in alone.items():
            assert_close(together[path][i], value, TOLERANCE, path)


def test_examples_by_vmap():
    apply = as_users_write(lambda p, x: mlp(p, x[None])[0])
    single = jax.vmap(lambda x: gradients(apply, MLP, x))(X)
    whole = gradients(as_users_write(mlp), MLP, X)
    for path, value in whole.items():
        assert_close(single[path].sum(0), value, TOLERANCE, path)


def test_the_pullback_is_linear_and_can_be_called_again():
    outputs, _, pullback = capture(as_users_write(mlp), MLP, X)
    one, two = pullback(outputs), pullback(2.0 * outputs)
    for name, g in one.items():
        assert_close(two[name], 2.0 * g, TOLERANCE, name)


@pytest.mark.parametrize(
    ("select", "names"),
    [("^w$", ["w"]), ("b|v", ["b", "v"]), (["w", "b"], ["w"]), (("v",), ["v"]), (None, ["w", "v"])],
)
def test_selection(select, names):
    sites = check_capture(mlp, MLP, X, select=select)
    assert list(sites) == names


def test_only_what_is_selected_is_kept():
    _, activations, pullback = capture(as_users_write(mlp), MLP, X, select="v")
    assert set(activations) == {"v"}
    assert set(pullback(jnp.ones((7, 3)))) == {"v"}


def test_a_program_that_closes_over_traced_values_and_keys():
    def run(params, x, factor):
        key = jax.random.key(3)
        table = jnp.asarray(np.arange(5.0), x.dtype)

        def apply(p, x):
            noise = jax.random.normal(key, (5,), x.dtype)
            return jnp.tanh(factor * (x @ p["w"] + p["b"] * factor) + table + noise) @ p["v"]

        return gradients(as_users_write(apply), params, x), jax.grad(
            lambda p: jnp.sin(as_users_write(apply)(p, x)).sum()
        )(params)

    ours, expected = jax.jit(run)(MLP, X, jnp.asarray(0.7, X.dtype))
    assert set(ours) == {"b", "v", "w"}
    for path, value in ours.items():
        assert_close(value, expected[path], TOLERANCE, path)


def test_inputs_of_several_leaves():
    def apply(params, inputs):
        return mlp(params, inputs["x"]) * inputs["mask"][:, None] + inputs["shift"]

    inputs = {"x": X, "mask": np.arange(7) % 2 * 1.0, "shift": np.float64(3.0)}
    check_capture(apply, MLP, inputs)


def test_half_precision_parameters_and_activations():
    def apply(params, x):
        h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])[0]
        return (h @ params["w"] + params["b"]).astype(jnp.float32) * params["g"]

    shapes = {"stack": (2, 4, 4), "w": (4, 5), "b": (5,), "g": (5,)}
    params = {name: jnp.asarray(normal(*s), jnp.bfloat16) for name, s in shapes.items()}
    x = jnp.asarray(X, jnp.bfloat16)
    sites = check_capture(apply, params, x, kinds={"b": {"dense"}, "g": {"scale"}}, tol=0.03)
    _, activations, pullback = capture(as_users_write(apply), params, x)
    assert activations["w"].dtype == jnp.bfloat16
    g = pullback(jnp.ones((7, 5), jnp.float32))
    assert {name: g[name].dtype for name in sites} == {
        "stack": jnp.bfloat16,
        "w": jnp.bfloat16,
        "g": jnp.float32,
    }


def test_the_size_of_what_is_kept():
    captured = run_capture(as_users_write(mlp), MLP, X)
    sizes = {name: math.prod(a.shape) for name, a in captured.activations.items()}
    assert sizes == {"w": 7 * 4, "v": 7 * 5}
