"""Capture on Flax Linen, Equinox and Haiku models, as they come."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest

from tests.tracing.oracle import check_capture, filled, normal, user_rules


def linen(module, inputs):
    """(apply, params) of a Linen module."""
    with user_rules():
        params = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return (lambda p, x: module.apply({"params": p}, x)), filled(params)


class LinenCnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, feature_group_count=2)(x))
        x = nn.GroupNorm(2)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_linen_convolution_and_dense():
    images = normal(2, 5, 6, 4)
    sites = check_capture(
        *linen(LinenCnn(), images),
        images,
        kinds={"Conv_0/bias": {"conv"}, "Dense_0/bias": {"dense"}, "GroupNorm_0/scale": {"scale"}},
    )
    assert sites["Conv_0/kernel"].weight.layers == 2


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        h = nn.gelu(nn.DenseGeneral((2, 3), axis=-1, name="up")(h))
        return x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="down")(h), None


class LinenScan(nn.Module):
    is_remat: bool

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock, prevent_cse=False) if self.is_remat else LinenBlock
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scanned(name="blocks")(x, None)
        return nn.Dense(2, use_bias=False)(x)


@pytest.mark.parametrize("is_remat", [False, True])
def test_linen_scan_over_layers(is_remat):
    x = normal(2, 3, 4)
    sites = check_capture(
        *linen(LinenScan(is_remat), x),
        x,
        kinds={"blocks/up/bias": {"dense"}, "blocks/down/bias": {"dense"}},
    )
    assert sites["blocks/up/kernel"].weight.layers == 3
    assert sites["blocks/LayerNorm_0/scale"].weight.layers == 3


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(9, 8, dtype=jnp.result_type(float))
        x = embed(ids) + self.param("position", nn.initializers.normal(), (1, 4, 8))
        x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(ids))
        return embed.attend(x)


def test_linen_transformer_with_tied_embedding():
    ids = jnp.array([[1, 2, 3, 0], [8, 4, 4, 1]])
    sites = check_capture(
        *linen(LinenAttention(), ids),
        ids,
        kinds={"Embed_0/embedding": {"embedding", "dense"}, "position": {"bias"}},
    )
    attention = "MultiHeadDotProductAttention_0"
    assert len({sites[f"{attention}/{n}/kernel"].record for n in ("query", "key", "value")}) == 1


def equinox(create):
    """(apply on a batch, params) of an Equinox module."""
    shapes = eqx.filter_eval_shape(create, jax.random.key(0))
    arrays, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    return (lambda p, x: jax.vmap(eqx.combine(p, static))(x)), filled(arrays)


def test_equinox_mlp_under_vmap():
    apply, params = equinox(lambda key: eqx.nn.MLP(4, 3, 5, 2, key=key))
    sites = check_capture(apply, params, normal(7, 4), kinds={"layers/0/bias": {"dense"}})
    assert sites["layers/0/weight"].weight.d_in == 4
    assert sites["layers/0/weight"].weight.d_out == 5
    assert len(sites) == 3


class EquinoxCnn(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, key=first)
        self.norm = eqx.nn.LayerNorm((4, 3, 2))
        self.head = eqx.nn.Linear(24, 3, key=second)

    def __call__(self, image):
        return self.head(self.norm(jax.nn.relu(self.conv(image))).reshape(-1))


def test_equinox_convolution_under_vmap():
    apply, params = equinox(EquinoxCnn)
    check_capture(
        apply,
        params,
        normal(3, 2, 5, 4),
        kinds={"conv/bias": {"conv"}, "norm/weight": {"scale"}, "head/bias": {"dense"}},
    )


class EquinoxAttention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=key)

    def __call__(self, x):
        return self.attention(x, x, x)


def test_equinox_attention_shares_its_input():
    apply, params = equinox(EquinoxAttention)
    sites = check_capture(apply, params, normal(2, 3, 4))
    names = [f"attention/{n}_proj/weight" for n in ("query", "key", "value")]
    assert len({sites[name].shared_input for name in names}) == 1


def haiku(function, inputs):
    """(apply, params) of a Haiku function."""
    transformed = hk.without_apply_rng(hk.transform(function))
    with user_rules():
        params = jax.eval_shape(transformed.init, jax.random.key(0), inputs)
    return transformed.apply, filled(params)


def test_haiku_mlp():
    def network(x):
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Linear(5)(x))
        return hk.nets.MLP([4, 3])(x)

    x = normal(2, 3, 4)
    sites = check_capture(*haiku(network, x), x, kinds={"linear/b": {"dense"}})
    assert sites["mlp/~/linear_0/w"].weight.bias_path == "mlp/~/linear_0/b"


def test_haiku_convolutions():
    def network(x):
        x = jax.nn.relu(hk.Conv2D(4, 3, stride=2, padding="SAME")(x))
        x = jax.nn.relu(hk.DepthwiseConv2D(2, 3, data_format="NHWC")(x))
        x = hk.Conv2DTranspose(3, 2, stride=2)(x)
        return hk.Linear(2)(hk.Flatten()(x))

    images = normal(2, 5, 6, 3)
    check_capture(*haiku(network, images), images, kinds={"conv2_d/b": {"conv"}})


def test_haiku_lstm():
    def network(x):
        core = hk.LSTM(3)
        x, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(2)(x)

    x = normal(4, 2, 3)
    sites = check_capture(*haiku(network, x), x)
    assert sites["lstm/linear/w"].num_uses == 4
