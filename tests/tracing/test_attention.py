"""Attention weights of models as libraries write them, against an attention written out in NumPy.

The oracle computes scores and softmax head by head in float64, out of the model's own parameters.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.extend import core as jex_core

from jedit.models import gpt
from jedit.tracing import AttentionMaps, attention_weights, find_attention
from tests.tracing.oracle import filled, normal, user_rules
from tests.tracing.test_flax_nnx import split

WIDTH, HEADS, SEQ = 8, 2, 5
CAUSAL = np.tril(np.ones((SEQ, SEQ), bool))


@pytest.fixture(autouse=True)
def _as_users():
    """Libraries mix dtypes and ranks as JAX lets users do."""
    with user_rules():
        yield


def softmax(scores, seen):
    """Softmax over the last axis among what is seen, in NumPy."""
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def by_hand(x, query, key, value, seen=True):
    """Weights (batch, heads, queries, keys) and what they sum; kernels (d, heads, d_head)."""
    x, query, key, value = (np.asarray(a, np.float64) for a in (x, query, key, value))
    weights = np.empty((len(x), query.shape[1], x.shape[1], x.shape[1]))
    summed = np.empty((len(x), x.shape[1], query.shape[1], value.shape[2]))
    for b, rows in enumerate(x):
        for h in range(query.shape[1]):
            scores = (rows @ query[:, h]) @ (rows @ key[:, h]).T / np.sqrt(query.shape[2])
            weights[b, h] = softmax(scores, seen)
            summed[b, :, h] = weights[b, h] @ (rows @ value[:, h])
    return weights, summed


def linen(module, x):
    with user_rules():
        params = filled(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    return (lambda p, x: module.apply({"params": p}, x)), params, (params, "query", "kernel")


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs
        )

    def __call__(self, x):
        return self.attention(x, mask=jnp.asarray(CAUSAL)[None, None])


def of_nnx(x):
    del x
    apply, params = split(Nnx)
    a = params["attention"]
    return apply, params, [a[n]["kernel"] for n in ("query", "key", "value")], CAUSAL


def of_linen(x):
    module = nn.MultiHeadDotProductAttention(HEADS, use_bias=False, param_dtype=x.dtype)
    apply, params, _ = linen(module, x)
    return apply, params, [params[n]["kernel"] for n in ("query", "key", "value")], True


def of_haiku(x):
    def network(x):
        return hk.MultiHeadAttention(
            HEADS, WIDTH // HEADS, w_init=hk.initializers.RandomNormal(), with_bias=False
        )(x, x, x)

    module = hk.without_apply_rng(hk.transform(network))
    with user_rules():
        params = filled(jax.eval_shape(module.init, jax.random.key(0), x))
    kernels = [
        params[f"multi_head_attention/{n}"]["w"].reshape(WIDTH, HEADS, -1)
        for n in ("query", "key", "value")
    ]
    return module.apply, params, kernels, True


def of_equinox(x):
    del x
    made = eqx.filter_eval_shape(
        lambda: eqx.nn.MultiheadAttention(HEADS, WIDTH, key=jax.random.key(0))
    )
    shapes, rest = eqx.partition(made, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    params = filled(shapes)

    def apply(p, x):
        module = eqx.combine(p, rest)
        return jax.vmap(lambda row: module(row, row, row, mask=jnp.asarray(CAUSAL)))(x)

    kernels = [
        getattr(params, f"{n}_proj").weight.T.reshape(WIDTH, HEADS, -1)
        for n in ("query", "key", "value")
    ]
    return apply, params, kernels, CAUSAL


def of_jax(x):
    _, params, kernels, seen = of_einsum(x)

    def apply(p, x):
        q, k, v = (jnp.einsum("bsd,dhe->bshe", x, p[n]) for n in ("query", "key", "value"))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return apply, params, kernels, seen


def of_einsum(x):
    del x
    draw = np.random.default_rng(3)
    params = {
        n: jnp.asarray(draw.normal(size=(WIDTH, HEADS, 4))) for n in ("query", "key", "value")
    }

    def apply(p, x):
        q, k, v = (jnp.einsum("bsd,dhe->bshe", x, p[n]) for n in ("query", "key", "value"))
        scores = jnp.einsum("bqhe,bkhe->bhqk", q, k) / jnp.sqrt(jnp.asarray(4.0, q.dtype))
        scores = jnp.where(jnp.asarray(CAUSAL), scores, -jnp.inf)
        return jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores, axis=-1), v)

    return apply, params, list(params.values()), CAUSAL


MODELS = {f.__name__: f for f in (of_nnx, of_linen, of_haiku, of_equinox, of_jax, of_einsum)}


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_a_library_are_those_written_out(name, tolerance):
    x = normal(3, SEQ, WIDTH)
    with user_rules():
        apply, params, kernels, seen = MODELS[name](x)
        found = find_attention(apply, params, x)
        run = jax.jit(lambda p: attention_weights(apply, p, x))(params)
        plain = jax.jit(apply)(params, x)
    assert (list(found), found.unseen) == (["attention/0"], ())
    one = found["attention/0"]
    weights, _ = by_hand(x, *kernels, seen)
    # Axes of length one, for groups of heads, stand anywhere.
    read = np.asarray(run.weights["attention/0"])
    assert (one.shape, one.dtype) == (read.shape, str(read.dtype))
    assert read.shape[one.keys] == SEQ
    assert (read.shape[one.queries], read.shape[one.examples]) == (SEQ, 3)
    order = [one.examples, one.queries, one.keys]
    rest = [i for i in range(read.ndim) if i not in order]
    read = np.transpose(read, [order[0], *rest, *order[1:]]).reshape(3, HEADS, SEQ, SEQ)
    if name in ("of_nnx", "of_jax"):  # JAX's own attention rounds its scores to float32
        np.testing.assert_allclose(read, weights, rtol=0, atol=1e-5)
    else:
        tolerance.check(read, weights)
    np.testing.assert_array_equal(run.outputs, plain)
    with user_rules():
        same = attention_weights(apply, params, x, replace={"attention/0": lambda p: p})
    np.testing.assert_array_equal(same.outputs, attention_weights(apply, params, x).outputs)


def test_changed_weights_sum_other_values(tolerance):
    x = normal(3, SEQ, WIDTH)
    apply, params, kernels, seen = of_einsum(x)
    weights, _ = by_hand(x, *kernels, seen)
    kept = np.array([1.0, 0.0, 1.0, 0.3, 1.0])

    def change(p):
        p = p * jnp.asarray(kept, p.dtype).reshape((1,) * (p.ndim - 1) + (-1,))
        return p / jnp.sum(p, axis=-1, keepdims=True)

    expected = weights * kept
    expected /= expected.sum(axis=-1, keepdims=True)
    values = np.einsum("bsd,dhe->bshe", np.asarray(x), np.asarray(kernels[2]))
    expected_outputs = np.einsum("bhqk,bkhe->bqhe", expected, values)
    run = attention_weights(apply, params, x, replace={"attention/0": change})
    tolerance.check(run.outputs, expected_outputs)
    given = run.weights["attention/0"]
    again = attention_weights(apply, params, x, replace={"attention/0": given})
    np.testing.assert_array_equal(again.outputs, run.outputs)

    # The gradient, through the change and with respect to what is put in place.
    def by_hand_fn(values_kernel):
        p = jnp.asarray(expected)
        v = jnp.einsum("bsd,dhe->bshe", x, values_kernel)
        return jnp.sum(jnp.einsum("bhqk,bkhe->bqhe", p, v) ** 2)

    def by_change(values_kernel):
        changed = {**params, "value": values_kernel}
        return jnp.sum(
            attention_weights(apply, changed, x, replace={"attention/0": change})[0] ** 2
        )

    tolerance.check(jax.grad(by_change)(params["value"]), jax.grad(by_hand_fn)(params["value"]))
    slope = jax.grad(
        lambda p: jnp.sum(attention_weights(apply, params, x, replace={"attention/0": p})[0] ** 2)
    )(given)
    two = 2 * np.einsum("bqhe,bkhe->bhqk", expected_outputs, values)
    tolerance.check(slope.reshape(two.shape), two)


def stacked(block, is_remat, unroll=1):
    """A stack of three layers in one scan, and the same written out."""

    def scanned(params, x):
        step = jax.checkpoint(block) if is_remat else block
        return jax.lax.scan(lambda h, p: (step(p, h), None), x, params, unroll=unroll)[0]

    def written_out(params, x):
        for i in range(3):
            x = block(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
        return x

    return scanned, written_out


def block(params, x):
    q, k, v = (x @ params[n] for n in ("q", "k", "v"))
    scores = jnp.einsum("bqd,bkd->bqk", q, k)
    scores = jnp.where(jnp.asarray(CAUSAL)[None], scores, -1e9)
    shifted = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return x + (shifted / shifted.sum(axis=-1, keepdims=True)) @ v


def block_params():
    draw = np.random.default_rng(4)
    return {n: jnp.asarray(draw.normal(size=(3, WIDTH, WIDTH)) / 3) for n in "qkv"}


@pytest.mark.parametrize("is_remat", [False, True])
def test_in_a_scan_over_layers_they_have_an_axis_for_them(is_remat, tolerance):
    scanned, written_out = stacked(block, is_remat)
    params, x = block_params(), normal(2, SEQ, WIDTH)
    found = find_attention(scanned, params, x)
    assert [(one.shape, one.num_scans) for one in found.values()] == [((3, 2, SEQ, SEQ), 1)]
    assert [(a.examples, a.queries, a.keys) for a in found.values()] == [(1, 2, 3)]
    apart = attention_weights(written_out, params, x)
    run = attention_weights(scanned, params, x)
    weights = jnp.stack([apart.weights[f"attention/{i}"] for i in range(3)])
    tolerance.check(run.outputs, apart.outputs)
    tolerance.check(run.weights["attention/0"], weights)
    # A function sees one layer, an array has one entry for each.
    half = lambda p: 0.5 * p  # noqa: E731
    names = [f"attention/{i}" for i in range(3)]
    expected = attention_weights(written_out, params, x, replace=dict.fromkeys(names, half))
    changed = attention_weights(scanned, params, x, replace={"attention/0": half})
    tolerance.check(changed.outputs, expected.outputs)
    put = jnp.asarray([1.0, 0.0, 2.0]).reshape(3, 1, 1, 1) * weights
    by_layer = dict(zip(names, put, strict=True))
    expected = attention_weights(written_out, params, x, replace=by_layer).outputs
    put_in = jax.jit(
        lambda put: attention_weights(scanned, params, x, replace={"attention/0": put})
    )
    tolerance.check(put_in(put).outputs, expected)

    def total(params):
        return jnp.sum(attention_weights(scanned, params, x).weights["attention/0"] ** 2)

    expected = jax.grad(
        lambda p: sum(jnp.sum(w**2) for w in attention_weights(written_out, p, x).weights.values())
    )(params)
    tolerance.check(jax.grad(total)(params), expected)


def test_the_gpt_attends_in_every_block_and_its_head_is_no_attention():
    apply, params = gpt(
        key=jax.random.key(0), vocab=7, width=4, num_layers=2, num_heads=2, max_len=SEQ
    )
    tokens = jnp.arange(2 * SEQ).reshape(2, SEQ) % 7
    found = find_attention(lambda p, t: jax.nn.softmax(apply(p, t), axis=-1), params, tokens)
    assert [one.shape for one in found.values()] == [(2, 2, SEQ, SEQ)] * 2
    assert "attention/1" in str(found)
    weights = attention_weights(apply, params, tokens).weights["attention/1"]
    assert np.all(np.triu(weights, 1) == 0)
    np.testing.assert_allclose(np.sum(weights, axis=-1), 1, rtol=1e-5)


def by_logsumexp(scores):
    return jnp.exp(jax.nn.log_softmax(scores, axis=-1))


def by_reciprocal(scores):
    top = jnp.exp(scores)
    return top * (1 / top.sum(axis=-1, keepdims=True))


def in_float32(scores):
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(scores.dtype)


@jax.custom_jvp
def with_a_rule(scores):
    return jax.nn.softmax(scores, axis=-1)


with_a_rule.defjvp(lambda primals, tangents: jax.jvp(jax.nn.softmax, primals, tangents))


@pytest.mark.parametrize("form", [by_logsumexp, by_reciprocal, in_float32, with_a_rule])
def test_forms_of_a_softmax(form):
    x = normal(2, SEQ, WIDTH)
    scores = lambda x: jnp.einsum("bqd,bkd->bqk", x, x)  # noqa: E731
    apply = lambda p, x: form(scores(x)) @ (x @ p)  # noqa: E731
    params = jnp.eye(WIDTH)
    run = attention_weights(apply, params, x)
    expected = jax.nn.softmax(scores(x), axis=-1)
    np.testing.assert_allclose(run.weights["attention/0"], expected, rtol=1e-5, atol=1e-7)
    none = attention_weights(apply, params, x, replace={"attention/0": jnp.zeros(())})
    assert not np.any(none.outputs)


def flash(p, x):
    scores = jnp.exp(jnp.einsum("bqd,bkd->bqk", x, x))
    return (scores @ (x @ p)) / scores.sum(axis=-1, keepdims=True)


@jax.custom_vjp
def ruled(x):
    return jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x), axis=-1) @ x


ruled.defvjp(lambda x: (ruled(x), None), lambda _, g: (g,))


def mixture(p, x):
    gates = jax.nn.softmax(x @ p, axis=-1)
    return jnp.einsum("bse,bsd->bse", gates, x)


def test_what_forms_no_weights_is_said_and_a_gate_is_no_attention():
    x = normal(2, SEQ, WIDTH)
    found = find_attention(flash, jnp.eye(WIDTH), x)
    assert not found
    assert "flash" in found.unseen[0]
    found = find_attention(lambda p, x: ruled(x @ p), jnp.eye(WIDTH), x)
    assert not found
    assert "custom derivative rule" in found.unseen[0]
    found = find_attention(mixture, jnp.eye(WIDTH), x)
    assert (len(found), found.unseen) == (0, ())


def softmax_of_two(x):
    top = jnp.exp2(jnp.einsum("bqd,bkd->bqk", x, x))
    return (top / top.sum(axis=-1, keepdims=True)) @ x


def attend(x):
    return jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x), axis=-1) @ x


def in_a_loop(x):
    step = lambda state: (state[0] + 1, attend(state[1]))  # noqa: E731
    return jax.lax.while_loop(lambda state: state[0] < 2, step, (0, x))[1]


def linear(x):
    scores = jnp.einsum("bqd,bkd->bqk", x, x) * jnp.asarray(CAUSAL)[None]
    return jnp.einsum("bqk,bkd->bqd", scores, x)


def by_states(x):
    return jnp.einsum("bqd,bde->bqe", x, jnp.einsum("bkd,bke->bde", jax.nn.relu(x), x))


def kernel(x):
    def run(x_ref, out_ref):
        rows = x_ref[...]
        out_ref[...] = jax.nn.softmax(rows @ rows.T, axis=-1) @ rows

    shape = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return jax.vmap(lambda rows: pl.pallas_call(run, shape, interpret=True)(rows))(x)


def fused(x):
    return fused_p.bind(x, x, x)


fused_p = jex_core.Primitive("dot_product_attention_fwd")
fused_p.def_abstract_eval(lambda *operands: operands[0])


@pytest.mark.parametrize("inner", [in_a_loop, linear, by_states, kernel, fused])
def test_what_is_missed_beside_a_plain_layer_is_said(inner):
    """Else a token would be hidden in the one layer, and heard in the other."""
    apply = lambda p, x: inner(attend(x @ p) @ p)  # noqa: E731
    found = find_attention(apply, jnp.eye(WIDTH), normal(2, SEQ, WIDTH))
    assert len(found) == 1
    assert len(found.unseen) == 1
    with pytest.raises(ValueError, match="forms no attention weights"):
        AttentionMaps().without(apply, jnp.eye(WIDTH), normal(2, SEQ, WIDTH), 1)


def test_a_loop_without_attention_says_nothing():
    def apply(p, x):
        state = (0, attend(x))
        step = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p) * jax.nn.softmax(s[1] @ p))  # noqa: E731
        return jax.lax.while_loop(lambda s: s[0] < 2, step, state)[1]

    found = find_attention(apply, jnp.eye(WIDTH), normal(2, SEQ, WIDTH))
    assert (len(found), found.unseen) == (1, ())


def test_a_power_or_share_of_the_sum_is_no_softmax():
    x = normal(2, SEQ, WIDTH)

    def odd(how):
        def apply(p, x):
            del p
            top = jnp.exp(jnp.einsum("bqd,bkd->bqk", x, x))
            return (top * how(top.sum(axis=-1, keepdims=True), x)) @ x

        return apply

    for how in (lambda total, _: total**-2, lambda total, x: x[..., :1] / total):
        assert not find_attention(odd(how), jnp.eye(WIDTH), x)


def test_heads_mixed_by_a_parameter_and_another_base_are_attention():
    def mixed(p, x):
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x), axis=-1)
        weights = jnp.einsum("bqk,hg->bqkhg", weights, p)[..., 0, 1]
        return weights @ x

    x = normal(2, SEQ, WIDTH)
    assert len(find_attention(mixed, jnp.eye(WIDTH), x)) == 1
    assert len(find_attention(lambda p, x: softmax_of_two(x @ p), jnp.eye(WIDTH), x)) == 1


def test_what_does_not_see_a_hidden_token_stays_to_the_bit():
    x, apply = normal(2, SEQ, WIDTH), block
    params = jax.tree.map(lambda leaf: leaf[0], block_params())
    maps = AttentionMaps()
    run = jax.jit(lambda position: maps.without(apply, params, x, position))
    whole, hidden = run(-1), run(3)
    np.testing.assert_array_equal(hidden[:, :4], whole[:, :4])
    assert np.all(hidden[:, 4:] != whole[:, 4:])


def test_one_example_has_the_axes_of_several():
    x = normal(3, SEQ, WIDTH)
    apply, params, _, _ = of_einsum(x)
    axes = [
        [(a.examples, a.queries, a.keys) for a in find_attention(apply, params, rows).values()]
        for rows in (x, x[:1])
    ]
    assert axes[0] == axes[1] == [(0, 2, 3)]


def test_a_branch_not_taken_has_weights_of_zero(tolerance):
    def attend(x):
        return jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x), axis=-1) @ x

    def apply(p, x):
        return jax.lax.cond(p > 0, attend, lambda x: x, x)

    x = normal(2, SEQ, WIDTH)
    run = attention_weights(apply, jnp.asarray(1.0), x)
    tolerance.check(run.outputs, attend(x))
    np.testing.assert_allclose(run.weights["attention/0"].sum(axis=-1), 1, rtol=1e-5)
    assert not np.any(attention_weights(apply, jnp.asarray(-1.0), x).weights["attention/0"])


def test_mistakes_get_a_sentence():
    x = normal(2, SEQ, WIDTH)
    scanned, _ = stacked(block, is_remat=False)
    with pytest.raises(ValueError, match=r"are no attention of this function; it has attention/0"):
        attention_weights(scanned, block_params(), x, replace={"attention/1": lambda p: p})
    with pytest.raises(ValueError, match=r"returned \(2, 5\), expected the weights' shape"):
        attention_weights(scanned, block_params(), x, replace={"attention/0": lambda p: p[0, :2]})
    with pytest.raises(ValueError, match="must return one array"):
        find_attention(lambda p, x: (x, p), jnp.eye(2), x)
