"""The residual network against plain NumPy, and what the tracing finds in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jedit
from jedit.models import resnet
from jedit.tracing import find_sites

TINY = {"image_shape": (6, 5, 2), "num_classes": 3, "width": 4, "blocks": (1, 2)}


@pytest.fixture
def float_dtype():
    return jnp.result_type(float)


def randomised(params, seed=0):
    """Every leaf random: gains of 0 and biases of 0 would hide mistakes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x, np.float64) + 0.3 * rng.normal(size=x.shape), x.dtype),
        params,
    )


def conv(x, kernel, stride):
    """Position by position: the window's product with the kernel."""
    n, height, width, _ = x.shape
    size = kernel.shape[0]
    pad = size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = np.zeros((n, -(-height // stride), -(-width // stride), kernel.shape[-1]))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = np.einsum("nabc,abcd->nd", window, kernel)
    return out


def norm(x, tree, groups):
    out = np.empty_like(x)
    per_group = x.shape[-1] // groups
    for n in range(len(x)):
        for g in range(groups):
            part = x[n, :, :, g * per_group : (g + 1) * per_group]
            normalised = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
            out[n, :, :, g * per_group : (g + 1) * per_group] = normalised
    return out * tree["scale"] + tree["bias"]


def reference(params, x, *, stem_stride=1):
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    groups = {4: 4, 8: 8}  # a group norm of one channel each, at these widths
    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    h = conv(np.asarray(x, np.float64), tree["stem"]["kernel"], stem_stride)
    h = relu(norm(h, tree["stem_norm"], groups[h.shape[-1]]))
    for i, stage in sorted(tree["stages"].items()):
        for j, block in sorted(stage.items()):
            stride = 2 if (i, j) == ("1", "0") else 1
            inner = conv(h, block["conv1"]["kernel"], stride)
            inner = relu(norm(inner, block["norm1"], groups[inner.shape[-1]]))
            inner = conv(inner, block["conv2"]["kernel"], 1)
            if "shortcut" in block:
                h = conv(h, block["shortcut"]["kernel"], stride)
            h = relu(h + norm(inner, block["norm2"], groups[inner.shape[-1]]))
    return h.mean((1, 2)) @ tree["head"]["kernel"] + tree["head"]["bias"]


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_it_equals_numpy(key, float_dtype, tolerance, stem_stride):
    apply, params = resnet(key=key, **TINY, stem_stride=stem_stride, dtype=float_dtype)
    params = randomised(params)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 5, 2)), float_dtype)
    want = reference(params, x, stem_stride=stem_stride)
    tolerance.check(jax.jit(apply)(params, x), want)


def test_a_group_norm_of_several_channels_equals_numpy():
    """16 channels make eight groups of two."""
    from jedit.models._residual import GroupNorm

    module = GroupNorm(16, jnp.float32)
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(size=(2, 16))
    module.scale[...], module.bias[...] = (jnp.asarray(v, jnp.float32) for v in (scale, bias))
    x = rng.normal(size=(2, 3, 2, 16)).astype(np.float32)
    want = norm(x.astype(np.float64), {"scale": scale, "bias": bias}, 8)
    np.testing.assert_allclose(module(jnp.asarray(x)), want, rtol=1e-4, atol=1e-5)


def test_every_parameter_is_found_and_its_gradient_is_the_sites(key):
    apply, params = resnet(key=key, **TINY)
    params = randomised(params)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 5, 2)), jnp.float32)
    sites = find_sites(apply, params, x)
    assert not sites.uncovered
    assert {site.kind for site in sites.values()} == {"conv", "scale", "bias", "dense"}
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)), jnp.float32)
    outputs, activations, pullback = jedit.capture(apply, params, x)
    found = jedit.weight_gradients(sites, activations, pullback(weights))
    wanted = jax.grad(lambda p: jnp.vdot(apply(p, x), weights))(params)
    assert outputs.shape == (3, 3)
    flat = jax.tree_util.tree_leaves_with_path(wanted)
    assert len(found) == len(flat)
    for path, leaf in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_allclose(found[name], leaf, rtol=2e-3, atol=2e-4, err_msg=name)


def test_a_row_does_not_depend_on_the_others_and_blocks_begin_as_the_identity(key):
    apply, params = resnet(key=key, **TINY)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 5, 2)), jnp.float32)
    np.testing.assert_allclose(apply(params, x)[:1], apply(params, x[:1]), rtol=1e-5, atol=1e-6)
    changed = jax.tree.map(lambda leaf: leaf, params)
    changed["stages"]["0"]["0"]["conv2"]["kernel"] *= 3.0
    np.testing.assert_array_equal(apply(changed, x), apply(params, x))


def test_the_dtype_is_kept_and_the_default_is_a_resnet_18(key):
    apply, params = resnet(key=key, **TINY, dtype=jnp.bfloat16)
    for images in (jnp.bfloat16, jnp.float32):
        assert apply(params, jnp.zeros((1, 6, 5, 2), images)).dtype == jnp.bfloat16
    shapes = jax.eval_shape(lambda key: resnet(key=key)[1], jax.random.clone(key))
    # 11,173,962 are the field's ResNet-18 for CIFAR-10; its three shortcuts have norms of 1,792
    # gains and shifts, which ours have not.
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 11_173_962 - 1_792
    for given, name in (
        ({"blocks": ()}, "blocks"),
        ({"blocks": (1, 0)}, "blocks"),
        ({"image_shape": (6, 0, 2)}, "image_shape"),
    ):
        with pytest.raises(ValueError, match=name):
            resnet(key=jax.random.clone(key), **given)
