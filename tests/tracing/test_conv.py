"""Convolution sites: strides, padding, dilation, groups, layouts, and what vmap makes of them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jedit.tracing import find_sites
from tests.tracing.oracle import check_capture, normal

GEOMETRIES = {
    "same": {"window_strides": (1, 1), "padding": "SAME"},
    "valid": {"window_strides": (1, 1), "padding": "VALID"},
    "strides": {"window_strides": (2, 3), "padding": "SAME"},
    "uneven padding": {"window_strides": (1, 2), "padding": [(1, 2), (0, 3)]},
    "negative padding": {"window_strides": (1, 1), "padding": [(-1, 0), (1, -1)]},
    "kernel dilation": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
    "dilation": {
        "window_strides": (1, 2),
        "padding": [(1, 1), (0, 2)],
        "lhs_dilation": (2, 3),
    },
    "everything": {
        "window_strides": (2, 1),
        "padding": [(2, 1), (0, 2)],
        "lhs_dilation": (2, 1),
        "rhs_dilation": (1, 2),
    },
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry(geometry, groups):
    def apply(params, x):
        return (
            lax.conv_general_dilated(
                x,
                params["k"],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
                **GEOMETRIES[geometry],
            )
            + params["b"]
        )

    params = {"k": normal(3, 2, 4 // groups, 8), "b": normal(8)}
    sites = check_capture(apply, params, normal(2, 5, 6, 4), kinds={"b": {"conv"}})
    assert sites["k"].weight.layers == groups
    assert sites["k"].weight.d_out == 8 // groups


@pytest.mark.parametrize(
    "layout", [("NCHW", "OIHW", "NCHW"), ("HWNC", "IOHW", "CNWH"), ("NHWC", "OHWI", "HNCW")]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_layouts(layout, groups):
    sizes = {"N": 2, "H": 5, "W": 4, "C": 4}
    kernel = {"O": 6, "I": 4 // groups, "H": 3, "W": 2}

    def apply(params, x):
        out = lax.conv_general_dilated(
            x, params["k"], (2, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
        )
        bias = params["b"].reshape([-1 if axis == "C" else 1 for axis in layout[2]])
        return jnp.tanh(out + bias)

    params = {"k": normal(*(kernel[a] for a in layout[1])), "b": normal(6)}
    check_capture(apply, params, normal(*(sizes[a] for a in layout[0])), kinds={"b": {"conv"}})


def conv(x, k, **more):
    dims = "DHW"[3 - (k.ndim - 2) :]
    numbers = (f"N{dims}C", f"{dims}IO", f"N{dims}C")
    strides = (1,) * len(dims)
    return lax.conv_general_dilated(x, k, strides, "SAME", dimension_numbers=numbers, **more)


@pytest.mark.parametrize("space", [(5,), (4, 3), (3, 4, 2)])
def test_one_two_and_three_dimensions(space):
    window = (2, 3, 1)[: len(space)]
    params = {"k": normal(*window, 3, 4)}
    check_capture(lambda p, x: conv(x, p["k"]), params, normal(2, *space, 3))


def test_patches_times_matrix_is_the_convolution():
    def apply(params, x):
        return conv(x, params["k"], feature_group_count=2)

    params, x = {"k": jnp.asarray(normal(3, 2, 2, 6))}, jnp.asarray(normal(2, 5, 4, 4))
    site = find_sites(apply, params, x)["k"]
    rows = site.canonical_inputs(x)
    assert rows.shape == (2, 2, 5, 4, 12)
    product = jnp.einsum("gnhwi,gio->gnhwo", rows, site.weight.gather(params))
    expected = site.canonical_gradients(apply(params, x))
    assert jnp.allclose(product, expected, atol=1e-5)


def test_a_kernel_laid_out_before_use():
    def apply(params, x):
        kernel = params["k"].reshape(4, 3, 3, 2).transpose(2, 3, 1, 0) * 0.25
        return jax.nn.relu(conv(x, kernel) + params["b"])

    check_capture(apply, {"k": normal(4, 18), "b": normal(4)}, normal(2, 4, 5, 3))


def test_vmapped_over_images_and_over_models():
    def model(params, image):
        h = jax.nn.relu(conv(image[None], params["k"]) + params["b"])
        return conv(h, params["k2"], feature_group_count=2)[0]

    params = {"k": normal(2, 2, 3, 4), "b": normal(4), "k2": normal(2, 1, 2, 6)}
    batched = jax.vmap(model, in_axes=(None, 0))
    check_capture(batched, params, normal(3, 4, 5, 3), kinds={"b": {"conv"}})
    stacked = {name: normal(2, *p.shape) for name, p in params.items()}
    sites = check_capture(jax.vmap(batched), stacked, normal(2, 3, 4, 5, 3))
    assert sites["k"].weight.layers == 2
    assert sites["k2"].weight.layers == 4
    check_capture(jax.vmap(batched, in_axes=(0, None)), stacked, normal(3, 4, 5, 3))


def test_scanned_layers_and_a_kernel_used_in_every_step():
    def apply(params, x):
        def layer(h, p):
            out = conv(h, p["k"], feature_group_count=2) + p["b"] + conv(h, params["shared"])
            return jnp.tanh(out), None

        return lax.scan(jax.checkpoint(layer), x, params["layers"])[0]

    params = {
        "layers": {"k": normal(3, 2, 2, 2, 4), "b": normal(3, 4)},
        "shared": normal(2, 1, 4, 4),
    }
    sites = check_capture(apply, params, normal(2, 4, 3, 4))
    assert sites["layers/k"].weight.layers == 6
    assert sites["shared"].num_uses == 3


def test_what_is_not_a_convolution_of_the_inputs_is_uncovered():
    def apply(params, x):
        h = lax.conv_general_dilated(
            x,
            params["k"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            batch_group_count=2,
        )
        return h + conv(params["image"][None], x.mean(0)[:, :, None])

    params = {"k": normal(2, 3, 4), "image": normal(5, 3)}
    sites = check_capture(apply, params, normal(2, 5, 3), uncovered=("k", "image"))
    assert "batch groups" in sites.uncovered["k"]
    assert "left operand of a convolution" in sites.uncovered["image"]
