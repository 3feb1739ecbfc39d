"""The reference models against plain NumPy, and their promises as pure functions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from numpy.testing import assert_array_equal

from jedit.core.batch import PackedTokens
from jedit.models import (
    cached_decode,
    cast_params,
    cnn,
    gpt,
    gpt_stepper,
    greedy_decode,
    mixed_precision,
    mlp,
    sampled_decode,
    to_pure,
)
from jedit.tracing import find_sites

RANDOM = ("random", "threefry", "rng_bit_generator")


def paths(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


def numpy_tree(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def randomised(params, key):
    """The same structure, every leaf random: zero biases and unit gains would hide mistakes."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def shifted(leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape)
        return jnp.asarray(np.asarray(leaf, np.float64) + noise, leaf.dtype)

    return jax.tree.map(shifted, params)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(sub)


def primitives(jaxpr):
    return (eqn.primitive.name for eqn in equations(jaxpr))


def test_mlp_equals_numpy(keys, float_dtype, tolerance):
    apply, params = mlp(key=next(keys), sizes=(6, 5, 4, 3), dtype=float_dtype)
    params = randomised(params, next(keys))
    x = jax.random.normal(next(keys), (7, 2, 3), float_dtype)
    h = np.asarray(x, np.float64).reshape(7, 6)
    layers = numpy_tree(params)["layers"]
    for i in range(3):
        h = h @ layers[str(i)]["kernel"] + layers[str(i)]["bias"]
        h = np.maximum(h, 0) if i < 2 else h
    tolerance.check(jax.jit(apply)(params, x), h)
    assert paths(params)["layers/1/kernel"].shape == (5, 4)


def test_mlp_with_the_identity_is_a_product_of_matrices(keys, float_dtype, tolerance):
    apply, params = mlp(key=next(keys), sizes=(4, 3, 2), activation=lambda x: x, dtype=float_dtype)
    x = jax.random.normal(next(keys), (5, 4), float_dtype)
    layers = numpy_tree(params)["layers"]
    want = np.asarray(x, np.float64) @ layers["0"]["kernel"] @ layers["1"]["kernel"]
    tolerance.check(jax.jit(apply)(params, x), want)


def numpy_conv(x, kernel, bias):
    """3 x 3 cross-correlation with zero padding, written as nine shifted products."""
    n, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((n, height, width, kernel.shape[-1])) + bias
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + height, j : j + width] @ kernel[i, j]
    return out


def test_cnn_equals_numpy(keys, float_dtype, tolerance):
    apply, params = cnn(
        key=next(keys),
        image_shape=(8, 4, 2),
        num_classes=5,
        channels=(3, 4),
        hidden=6,
        dtype=float_dtype,
    )
    params = randomised(params, next(keys))
    x = jax.random.normal(next(keys), (3, 8, 4, 2), float_dtype)
    h, tree = np.asarray(x, np.float64), numpy_tree(params)
    for i in range(2):
        h = np.maximum(
            numpy_conv(h, tree["convs"][str(i)]["kernel"], tree["convs"][str(i)]["bias"]), 0
        )
        h = np.maximum.reduce([h[:, a::2, b::2] for a in range(2) for b in range(2)])
    h = np.maximum(h.reshape(3, -1) @ tree["hidden"]["kernel"] + tree["hidden"]["bias"], 0)
    want = h @ tree["head"]["kernel"] + tree["head"]["bias"]
    tolerance.check(jax.jit(apply)(params, x), want)


def numpy_norm(x, tree):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * tree["scale"]
        + tree["bias"]
    )


def numpy_dense(x, tree):
    return x @ tree["kernel"] + tree["bias"]


def numpy_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_perceptron(tree, h):
    return numpy_dense(numpy_gelu(numpy_dense(h, tree["up"])), tree["down"])


def numpy_gpt(tree, tokens, num_heads, mlp=numpy_perceptron):
    """The forward pass, token by token and head by head."""
    rows = []
    for row in np.asarray(tokens):
        x = tree["embed"]["embedding"][row] + tree["positions"][: len(row)]
        for i in range(len(tree["blocks"])):
            block = tree["blocks"][str(i)]
            h = numpy_norm(x, block["attn_norm"])
            q, k, v = (numpy_dense(h, block["attn"][n]) for n in ("query", "key", "value"))
            mixed = np.zeros_like(q)
            size = q.shape[-1] // num_heads
            for head in range(num_heads):
                part = slice(head * size, (head + 1) * size)
                for t in range(len(row)):
                    score = k[: t + 1, part] @ q[t, part] / np.sqrt(size)
                    weight = np.exp(score - score.max())
                    mixed[t, part] = weight / weight.sum() @ v[: t + 1, part]
            x = x + numpy_dense(mixed, block["attn"]["out"])
            h = numpy_norm(x, block["mlp_norm"])
            x = x + mlp(block["mlp"], h)
        rows.append(numpy_norm(x, tree["norm"]) @ tree["head"]["kernel"])
    return np.stack(rows)


def small_gpt(key, dtype=jnp.float32):
    apply, params = gpt(
        key=jax.random.fold_in(key, 0),
        vocab=11,
        width=8,
        num_layers=2,
        num_heads=2,
        max_len=7,
        dtype=dtype,
    )
    return apply, randomised(params, jax.random.fold_in(key, 1))


def test_gpt_equals_numpy(keys, float_dtype, tolerance):
    apply, params = small_gpt(next(keys), float_dtype)
    tokens = jax.random.randint(next(keys), (3, 6), 0, 11)
    tolerance.check(jax.jit(apply)(params, tokens), numpy_gpt(numpy_tree(params), tokens, 2))


def test_gpt_sees_nothing_to_the_right(keys, float_dtype):
    apply, params = small_gpt(next(keys), float_dtype)
    tokens = jax.random.randint(next(keys), (3, 6), 0, 11)
    changed = tokens.at[:, 4:].set((tokens[:, 4:] + 1) % 11)
    before, after = (jax.jit(apply)(params, x) for x in (tokens, changed))
    assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(np.asarray(before - after)[:, 4:]).max() > 1e-3


def test_packed_rows_have_their_own_positions_and_see_no_other(keys, float_dtype, tolerance):
    """By hand: two rows in one sequence, longer than the positions, and padding behind."""
    apply, params = small_gpt(next(keys), float_dtype)
    tree, (first, second) = numpy_tree(params), ([3, 1, 4, 9, 5], [2, 6, 5])
    packed = PackedTokens(
        jnp.asarray([[*first, *second, 0, 0]]),
        jnp.asarray([[8, 8, 8, 8, 8, 3, 3, 3, 0, 0]]),
        jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 0, 0]]),
    )
    got = jax.jit(apply)(params, packed)
    tolerance.check(got[:, :5], numpy_gpt(tree, [first], 2))
    tolerance.check(got[:, 5:8], numpy_gpt(tree, [second], 2))
    assert np.isfinite(np.asarray(got)).all()
    assert "positions" in find_sites(apply, params, packed).covered
    beyond = packed._replace(positions=packed.positions.at[0, 4].set(7))
    assert np.isnan(np.asarray(apply(params, beyond))).all()


def test_paths_are_the_documented_ones(key):
    _, params = small_gpt(key)
    shapes = {path: leaf.shape for path, leaf in paths(params).items()}
    assert shapes["blocks/0/attn/query/kernel"] == (8, 8)
    assert shapes["blocks/1/mlp/up/kernel"] == (8, 32)
    assert shapes["blocks/1/mlp/down/bias"] == (8,)
    assert shapes["blocks/0/attn_norm/scale"] == (8,)
    assert shapes["positions"] == (7, 8)
    assert shapes["embed/embedding"] == (11, 8)
    assert shapes["head/kernel"] == (8, 11)
    assert "head/bias" not in shapes
    _, params = cnn(key=jax.random.fold_in(key, 1))
    assert {p: x.shape for p, x in paths(params).items() if "kernel" in p} == {
        "convs/0/kernel": (3, 3, 1, 16),
        "convs/1/kernel": (3, 3, 16, 32),
        "hidden/kernel": (128, 64),
        "head/kernel": (64, 10),
    }


def makers(key, dtype):
    keys = jax.random.split(key, 3)
    tokens = jnp.zeros((2, 5), jnp.int32)
    images = jnp.zeros((2, 8, 8, 1), dtype)
    return {
        "gpt": (*small_gpt(keys[0], dtype), tokens),
        "cnn": (*cnn(key=keys[1], dtype=dtype), images),
        "mlp": (*mlp(key=keys[2], sizes=(64, 5, 3), dtype=dtype), images),
    }


@pytest.mark.parametrize("name", ["gpt", "cnn", "mlp"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_apply_is_pure_and_keeps_the_dtype(key, name, dtype):
    apply, params, inputs = makers(key, dtype)[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    traced = jax.make_jaxpr(apply)(params, inputs)
    assert not [p for p in primitives(traced.jaxpr) if p.startswith(RANDOM)]
    assert not traced.effects
    assert not traced.consts
    outputs = jax.jit(apply)(params, inputs)
    assert outputs.dtype == dtype


@pytest.mark.parametrize("name", ["gpt", "cnn", "mlp"])
def test_products_are_computed_in_the_dtype_of_the_parameters(key, name):
    """Also where they were made in another one, as a mixed-precision training has it."""
    apply, params, inputs = makers(key, jnp.float32)[name]
    inputs = cast_params({"x": inputs}, jnp.bfloat16)["x"]  # tokens stay tokens
    traced = jax.make_jaxpr(mixed_precision(apply, jnp.bfloat16))(params, inputs)
    found = [
        {x.aval.dtype.name for x in (*eqn.invars, *eqn.outvars)}
        for eqn in equations(traced.jaxpr)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert len(found) >= 2
    assert all(dtypes == {"bfloat16"} for dtypes in found)


@pytest.mark.reuses_keys
def test_the_key_decides_the_parameters(key):
    first, again = (mlp(key=key, sizes=(4, 3))[1] for _ in range(2))
    other = mlp(key=jax.random.fold_in(key, 1), sizes=(4, 3))[1]
    assert_array_equal(first["layers"]["0"]["kernel"], again["layers"]["0"]["kernel"])
    assert np.any(first["layers"]["0"]["kernel"] != other["layers"]["0"]["kernel"])


def test_many_layers_keep_their_order(key, float_dtype, tolerance):
    """String keys sort as text, "10" before "2"; the layers must not."""
    sizes = (2,) * 13
    apply, params = mlp(key=key, sizes=sizes, activation=lambda x: x, dtype=float_dtype)
    want = np.ones((1, 2))
    for i in range(len(sizes) - 1):
        want = want @ np.asarray(params["layers"][str(i)]["kernel"])
    got = jax.jit(apply)(params, jnp.ones((1, 2), float_dtype))
    tolerance.check(got, want)


def test_greedy_decode_equals_a_loop(keys, float_dtype):
    apply, params = small_gpt(next(keys), float_dtype)
    tree = numpy_tree(params)
    prompts = [[3, 1, 4], [5, 9], [2, 6, 5]]
    padded = jnp.asarray([[3, 1, 4], [5, 9, 7], [2, 6, 5]], jnp.int32)
    got = greedy_decode(apply, params, padded, 4, prompt_lengths=jnp.asarray([3, 2, 3]))
    for row, prompt in zip(np.asarray(got), prompts, strict=True):
        tokens = list(prompt)
        for _ in range(4):
            tokens.append(int(np.argmax(numpy_gpt(tree, [tokens], 2)[0, -1])))
        assert list(row) == tokens[len(prompt) :]
    assert_array_equal(greedy_decode(apply, params, padded, 4)[::2], got[::2])


def test_what_is_drawn_is_the_largest_of_the_logits_with_gumbel_noise(keys, float_dtype):
    """Drawn from whole passes, position by position, and as often as the softmax says."""
    apply, params = small_gpt(next(keys), float_dtype)
    stepper = gpt_stepper(num_layers=len(params["blocks"]), num_heads=2)
    padded = jnp.asarray([[3, 1, 4], [5, 9, 7]], jnp.int32)
    lengths, key, temperature = np.array([3, 2]), next(keys), 2.5
    options = {"key": key, "temperature": temperature}
    forward = jax.jit(apply)
    got = np.asarray(sampled_decode(stepper, params, padded, 3, prompt_lengths=lengths, **options))
    for row, length in enumerate(lengths):
        tokens = np.asarray(padded)[row, :length].tolist()
        for token in got[row]:
            whole = jnp.asarray([tokens + [0] * (6 - len(tokens))], jnp.int32)
            logits = forward(params, whole)[0, len(tokens) - 1]
            at = jax.random.fold_in(jax.random.fold_in(key, row), len(tokens) - 1)
            noise = np.asarray(jax.random.gumbel(at, logits.shape, logits.dtype), np.float64)
            assert token == np.argmax(np.asarray(logits, np.float64) / temperature + noise)
            tokens.append(int(token))
    # Neither other rows nor fewer steps change a draw.
    fewer = sampled_decode(stepper, params, padded[:1], 2, prompt_lengths=lengths[:1], **options)
    assert_array_equal(fewer, got[:1, :2])
    cold = sampled_decode(
        stepper, params, padded, 3, key=key, temperature=1e-4, prompt_lengths=lengths
    )
    assert_array_equal(cold, cached_decode(stepper, params, padded, 3, prompt_lengths=lengths))
    n = 4000
    same = sampled_decode(stepper, params, jnp.tile(padded[:1], (n, 1)), 1, **options)
    p = np.asarray(
        jax.nn.softmax(forward(params, jnp.pad(padded[:1], ((0, 0), (0, 3))))[0, 2] / temperature)
    )
    found = np.bincount(np.asarray(same)[:, 0], minlength=len(p)) / n
    assert np.all(np.abs(found - p) <= 4 * np.sqrt(p * (1 - p) / n))
    with pytest.raises(ValueError, match="temperature must be positive"):
        sampled_decode(stepper, params, padded, 3, key=key, temperature=0.0)


def test_cached_decode_equals_whole_passes(keys, float_dtype):
    apply, params = small_gpt(next(keys), float_dtype)
    stepper = gpt_stepper(num_layers=len(params["blocks"]), num_heads=2)
    padded = jnp.asarray([[3, 1, 4, 7], [5, 9, 7, 7], [2, 6, 5, 7], [8, 7, 7, 7]], jnp.int32)
    lengths = jnp.asarray([4, 2, 3, 1])
    got = cached_decode(stepper, params, padded, 3, prompt_lengths=lengths)
    assert_array_equal(got, greedy_decode(apply, params, padded, 3, prompt_lengths=lengths))
    assert_array_equal(
        cached_decode(stepper, params, padded, 1, prompt_lengths=lengths)[:, 0], got[:, 0]
    )
    with pytest.raises(ValueError, match="8 tokens long, but the model has 7 positions"):
        cached_decode(stepper, params, padded, 5, prompt_lengths=lengths)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        cached_decode(stepper, params, padded, 0)


def test_a_step_gives_the_logits_of_a_whole_pass(keys, float_dtype, tolerance):
    apply, params = small_gpt(next(keys), float_dtype)
    stepper = gpt_stepper(num_layers=len(params["blocks"]), num_heads=2)
    tokens = jnp.asarray([[3, 1, 4, 7], [5, 9, 7, 2]], jnp.int32)
    cache, found = stepper.init(params, 2, 4), []
    for position in range(4):
        logits, cache = stepper.step(params, tokens[:, position], jnp.asarray(position), cache)
        found.append(logits)
    tolerance.check(jnp.stack(found, axis=1), apply(params, tokens))


def test_failures_say_what_to_do(key):
    with pytest.raises(ValueError, match="width 9 is not a multiple of num_heads 2"):
        gpt(key=key, vocab=3, width=9, num_layers=1, num_heads=2, max_len=4)
    with pytest.raises(ValueError, match="divisible by 4"):
        cnn(key=key, image_shape=(6, 8, 1))
    with pytest.raises(ValueError, match="at least an input and an output width"):
        mlp(key=key, sizes=(3,))
    apply, params = small_gpt(key)
    with pytest.raises(ValueError, match="8 tokens long, but the model has 7 positions"):
        apply(params, jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        greedy_decode(apply, params, jnp.zeros((1, 2), jnp.int32), 0)
    with pytest.raises(ValueError, match=r"prompt_lengths must be \(2,\), got \(3,\)"):
        greedy_decode(apply, params, jnp.zeros((2, 2), jnp.int32), 1, prompt_lengths=jnp.arange(3))
    with pytest.raises(ValueError, match="Dropout carries state that is no parameter"):
        to_pure(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))


@pytest.fixture
def float_dtype():
    return jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32


@pytest.fixture
def keys(key):
    return (jax.random.fold_in(key, i) for i in itertools.count())


def test_a_module_that_is_called_in_a_way_of_its_own(key):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 2, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])

        def __call__(self, x, y):
            return self.layers[0](x) + self.layers[1](y), None

    module = Two(nnx.Rngs(key))
    apply, params = to_pure(module, lambda module, x: module(x, 2 * x)[0])
    x = jax.random.normal(key, (4, 3), jnp.float32)
    one, two = (numpy_tree(params)["layers"][i]["kernel"] for i in "01")
    want = np.asarray(x, np.float64) @ (one + 2 * two)
    np.testing.assert_allclose(np.asarray(apply(params, x)), want, rtol=0, atol=1e-5)


def test_mixed_precision_adds_small_steps_up(keys):
    plain, params = mlp(key=next(keys), sizes=(6, 5, 4), dtype=jnp.float32)
    apply = mixed_precision(plain, jnp.bfloat16)
    x = jax.random.normal(next(keys), (7, 6), jnp.bfloat16)
    half = cast_params(params, jnp.bfloat16)
    want = plain(half, x)
    assert want.dtype == jnp.bfloat16
    assert_array_equal(apply(params, x), want.astype(jnp.float32))
    assert not find_sites(apply, params, x).uncovered
    # Thirty-two steps of a thousandth each: bfloat16 weights would stay where they are.
    stay, move = half, params
    for _ in range(32):
        stay, move = (
            jax.tree.map(lambda leaf: leaf * jnp.asarray(1 + 2.0**-10, leaf.dtype), tree)
            for tree in (stay, move)
        )
    assert_array_equal(plain(stay, x), want)
    assert np.max(np.abs(np.asarray(apply(move, x) - apply(params, x)))) > 0.01
    gradient = jax.grad(lambda weights: jnp.sum(apply(weights, x) ** 2))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    counted = cast_params({"steps": jnp.ones(2, jnp.int32), "w": jnp.ones(2)}, jnp.bfloat16)
    assert [leaf.dtype.name for leaf in counted.values()] == ["int32", "bfloat16"]
