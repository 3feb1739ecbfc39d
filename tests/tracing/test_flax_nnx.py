"""Capture on Flax NNX modules, as they come."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jedit.tracing import capture, find_sites
from tests.tracing.oracle import as_users_write, check_capture, filled, normal


def split(create):
    """(apply, params) of the module that `create(rngs)` makes, the parameters as a pure dict."""
    module = nnx.eval_shape(lambda: create(nnx.Rngs(0)))
    graph, params, stats, rest = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    stats = jax.tree.map(jnp.asarray, filled(stats))

    def apply(p, x):
        return nnx.merge(graph, p, stats, rest)(x)

    return as_users_write(apply), filled(nnx.to_pure_dict(params))


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.last = nnx.Linear(6, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(nnx.relu(self.first(x))))


def test_mlp_with_layer_norm():
    apply, params = split(Mlp)
    sites = check_capture(
        apply,
        params,
        normal(2, 5, 4),
        kinds={"first/bias": {"dense"}, "norm/scale": {"scale"}, "norm/bias": {"bias"}},
    )
    assert sites["first/kernel"].weight.bias_path == "first/bias"
    assert "test_flax_nnx.py" in sites["first/kernel"].source


def test_an_nnx_state_is_a_pytree_of_parameters_too():
    module = nnx.eval_shape(lambda: Mlp(nnx.Rngs(0)))
    graph, state, rest = nnx.split(module, nnx.Param, ...)

    def apply(p, x):
        return nnx.merge(graph, p, rest)(x)

    sites = check_capture(apply, filled(state), normal(2, 5, 4))
    pure = find_sites(*split(Mlp), normal(2, 5, 4))
    assert len(sites) == len(pure)
    assert [s.kind for s in sites.values()] == [s.kind for s in pure.values()]


@pytest.mark.parametrize(
    ("axis", "in_features", "out_features", "shape"),
    [
        (-1, 4, (3, 2), (2, 5, 4)),
        ((-2, -1), (5, 4), 3, (2, 5, 4)),
        ((1, -1), (5, 4), (3, 2), (2, 5, 3, 4)),
    ],
)
def test_linear_general(axis, in_features, out_features, shape):
    apply, params = split(
        lambda rngs: nnx.LinearGeneral(in_features, out_features, axis=axis, rngs=rngs)
    )
    sites = check_capture(apply, params, normal(*shape), kinds={"bias": {"dense"}})
    assert len(sites) == 1


def test_linear_general_with_batch_axes():
    apply, params = split(
        lambda rngs: nnx.LinearGeneral(
            4, 3, axis=-1, batch_axis={0: 2}, rngs=rngs, bias_init=nnx.initializers.normal()
        )
    )
    sites = check_capture(apply, params, normal(2, 5, 4))
    assert sites["kernel"].weight.layers == 2


def test_attention_shares_one_activation_between_query_key_and_value():
    apply, params = split(lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs))
    sites = check_capture(
        apply,
        params,
        normal(2, 5, 8),
        kinds={f"{n}/bias": {"dense"} for n in ("query", "key", "out")},
    )
    records = {sites[f"{name}/kernel"].record for name in ("query", "key", "value")}
    assert len(records) == 1
    assert len({sites[f"{n}/kernel"].shared_input for n in ("query", "key", "value")}) == 1
    _, activations, _ = capture(apply, params, normal(2, 5, 8))
    assert activations["query/kernel"] is activations["key/kernel"]
    assert activations["query/kernel"] is activations["value/kernel"]


def test_attention_inside_a_jitted_call_still_shares():
    apply, params = split(lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs))
    _, activations, _ = capture(jax.jit(apply), params, normal(2, 5, 8))
    assert activations["query/kernel"] is activations["value/kernel"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
def test_conv(padding, groups):
    apply, params = split(
        lambda rngs: nnx.Conv(
            4, 6, (3, 2), strides=(2, 1), padding=padding, feature_group_count=groups, rngs=rngs
        )
    )
    check_capture(apply, params, normal(2, 6, 5, 4), kinds={"bias": {"conv"}})


def test_conv_transpose():
    apply, params = split(lambda rngs: nnx.ConvTranspose(3, 4, (3,), strides=2, rngs=rngs))
    check_capture(apply, params, normal(2, 5, 3), kinds={"bias": {"conv"}})


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 4, dtype=jnp.result_type(float), rngs=rngs)
        self.body = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.body(self.embed(ids))))


def test_tied_embedding_has_two_sites():
    apply, params = split(Tied)
    ids = jnp.array([[1, 2, 3], [4, 10, 0]])
    sites = check_capture(apply, params, ids, kinds={"embed/embedding": {"embedding", "dense"}})
    assert {"embed/embedding", "embed/embedding#1"} <= set(sites)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Scanned(nnx.Module):
    def __init__(self, rngs, *, is_remat):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return Block(rngs)

        self.blocks = create(rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)
        self.is_remat = is_remat

    def __call__(self, x):
        def step(x, block):
            return block(x)

        body = nnx.remat(step) if self.is_remat else step
        x = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.head(x)


@pytest.mark.parametrize("is_remat", [False, True])
def test_scanned_layers_are_one_site_with_a_layer_axis(is_remat):
    apply, params = split(lambda rngs: Scanned(rngs, is_remat=is_remat))
    sites = check_capture(
        apply,
        params,
        normal(2, 5, 6),
        kinds={"blocks/up/bias": {"dense"}, "blocks/norm/scale": {"scale"}},
    )
    site = sites["blocks/up/kernel"]
    assert site.weight.layers == 3
    assert site.weight.is_stacked
    assert site.num_uses == 1
    assert site.input_shape == (3, 2, 5, 6)


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 5, rngs=rngs))
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        carry = (jnp.zeros((len(x), 5), x.dtype),) * 2
        return self.head(self.rnn(x, initial_carry=carry))


def test_recurrent_network():
    apply, params = split(Recurrent)
    check_capture(apply, params, normal(2, 3, 4))


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.group = nnx.GroupNorm(4, 2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.group(self.norm(self.conv(x))))


def test_normalization_layers_after_a_convolution():
    apply, params = split(Normalized)
    kinds = {"norm/bias": {"bias"}, "group/bias": {"bias"}, "group/scale": {"scale"}}
    # Flax multiplies the gain with the running variance first, which is no activation.
    check_capture(apply, params, normal(2, 5, 3), kinds={**kinds, "norm/scale": {"scale"}})
