"""Dense sites: every order of dimensions, on either side, with and without batch dimensions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jedit.tracing import find_sites
from tests.tracing.oracle import check_capture, normal

SIZES = {"b": 2, "c": 3, "d": 4, "f": 5, "h": 2, "t": 3}


def dimension_orders():
    """Operands of einsum with every role of an axis at every place."""
    orders = [("bchf", "tcb", "thfb"), ("hcdf", "dbtch", "fbth"), ("c", "tc", "t")]
    for x, roles, out in [("ct", "cf", "tf"), ("tcb", "bcf", "btf"), ("cdt", "cdf", "tf")]:
        orders += [("".join(w), x, out) for w in itertools.permutations(roles)]
    return orders


@pytest.mark.parametrize("is_left", [True, False])
@pytest.mark.parametrize(("w", "x", "out"), dimension_orders())
def test_einsum_orders(w, x, out, is_left):
    formula = f"{w},{x}->{out}" if is_left else f"{x},{w}->{out}"

    def apply(params, inputs):
        operands = (params["w"], inputs) if is_left else (inputs, params["w"])
        return jnp.tanh(jnp.einsum(formula, *operands))

    shapes = [tuple(SIZES[axis] for axis in axes) for axes in (w, x)]
    sites = check_capture(apply, {"w": normal(*shapes[0])}, normal(*shapes[1], seed=1))
    batch = [axis for axis in w if axis in x and axis in out]
    free = [axis for axis in w if axis not in x]
    assert sites["w"].weight.layers == np.prod([SIZES[a] for a in batch], dtype=int)
    assert sites["w"].weight.d_out == np.prod([SIZES[a] for a in free], dtype=int)


@pytest.mark.parametrize("w_first", [True, False])
@pytest.mark.parametrize("summed", ["dc", "d"])
@pytest.mark.parametrize("batched", ["", "b", "hb"])
@pytest.mark.parametrize(("w", "x"), [("bcdfh", "thdcb"), ("fhdcb", "bcdht"), ("chbfd", "dthbc")])
def test_dot_general_itself(w, x, batched, summed, w_first):
    # dot_general keeps the two operands' free axes apart, however they are called.
    def dims(axes):
        return tuple(w.index(a) for a in axes), tuple(x.index(a) for a in axes)

    def apply(params, inputs):
        numbers = (dims(summed), dims(batched))
        if w_first:
            return lax.dot_general(params["w"], inputs, numbers)
        return lax.dot_general(inputs, params["w"], tuple(pair[::-1] for pair in numbers))

    shapes = [tuple(SIZES[a] for a in axes) for axes in (w, x)]
    sites = check_capture(apply, {"w": normal(*shapes[0])}, normal(*shapes[1], seed=1))
    assert sites["w"].weight.layers == np.prod([SIZES[a] for a in batched], dtype=int)
    assert sites["w"].weight.d_in == np.prod([SIZES[a] for a in summed], dtype=int)


def test_relayouts_before_use_are_undone():
    def apply(params, x):
        w = params["w"].reshape(2, 3, 5).transpose(2, 0, 1).reshape(5, 6)[1:4]
        return jnp.tanh(x @ (0.5 * w.T.astype(x.dtype) / 3 - 1.0))

    sites = check_capture(apply, {"w": normal(6, 5)}, normal(2, 6))
    np.testing.assert_allclose(sites["w"].scale, 0.5 / 3)


def test_gather_is_the_matrix_that_multiplies_and_scatter_its_adjoint():
    params = {"w": jnp.asarray(normal(5, 2, 4)), "b": jnp.asarray(normal(5))}

    def apply(p, x):
        return jnp.einsum("ohc,bhc->bo", p["w"], x) + p["b"][None]

    x = jnp.asarray(normal(3, 2, 4, seed=1))
    site = find_sites(apply, params, x)["w"]
    matrix = site.weight.gather(params)
    assert matrix.shape == (1, 9, 5)
    rows = site.canonical_inputs(x).reshape(3, 8)
    rows = jnp.concatenate([rows, jnp.ones((3, 1), rows.dtype)], axis=1)
    np.testing.assert_allclose(rows @ matrix[0], apply(params, x), rtol=1e-5)
    back = site.weight.scatter(matrix)
    np.testing.assert_array_equal(back["w"], params["w"])
    np.testing.assert_array_equal(back["b"], params["b"])


def test_a_weight_description_is_the_same_for_every_batch_size():
    def apply(p, x):
        h = jnp.einsum("btc,chf->bthf", x, p["w"]) + p["b"][None, None]
        h = h + p["one"]
        return jax.nn.gelu(h) * p["g"].T[None, None]

    params = {"w": normal(4, 3, 2), "b": normal(3, 2), "one": normal(1, 1, 3, 2), "g": normal(2, 3)}
    whole = find_sites(apply, params, normal(2, 5, 4))
    for shape in [(1, 5, 4), (2, 1, 4), (1, 1, 4)]:
        sites = find_sites(apply, params, normal(*shape))
        assert [s.weight for s in sites.values()] == [s.weight for s in whole.values()]
        assert [hash(s.weight) for s in sites.values()] == [hash(s.weight) for s in whole.values()]
        for name, site in sites.items():
            g = site.canonical_gradients(jnp.zeros(site.output_shape))
            other = whole[name].canonical_gradients(jnp.zeros(whole[name].output_shape))
            assert g.ndim == other.ndim
        check_capture(apply, params, normal(*shape))


def test_a_weight_cut_in_pieces_has_one_site_each():
    def apply(params, x):
        query, key, value = jnp.split(params["qkv"], 3, axis=1)
        return jnp.tanh(x @ query) * (x @ key) + x @ value

    sites = check_capture(apply, {"qkv": normal(4, 9)}, normal(2, 4))
    assert set(sites) == {"qkv", "qkv#1", "qkv#2"}
    assert len({site.record for site in sites.values()}) == 1


def test_a_stacked_leaf_indexed_layer_by_layer():
    def apply(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["w"][i] + params["b"][i])
        return x

    sites = check_capture(apply, {"w": normal(3, 4, 4), "b": normal(3, 4)}, normal(2, 4))
    assert [s.kind for s in sites.values()].count("dense") == 3


def test_a_shared_weight_is_one_sum():
    def apply(params, x):
        return jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"]) @ params["w"].T

    sites = check_capture(apply, {"w": normal(4, 4)}, normal(3, 4))
    assert len(sites) == 3


def test_two_parameters_in_one_contraction_are_uncovered():
    def apply(params, x):
        return x @ (params["a"] @ params["b"]) + (x @ params["a"]) @ params["c"]

    params = {"a": normal(4, 2), "b": normal(2, 3), "c": normal(2, 3)}
    sites = check_capture(apply, params, normal(5, 4), uncovered=("a", "b"))
    assert "contracted with another parameter" in sites.uncovered["a"]


def test_a_vmapped_ensemble_has_one_block_per_member():
    def apply(params, x):
        return jax.vmap(lambda p, v: jnp.tanh(v @ p["w"] + p["b"]) @ p["v"])(params, x)

    params = {"w": normal(6, 4, 5), "b": normal(6, 5), "v": normal(6, 5, 2)}
    sites = check_capture(apply, params, normal(6, 7, 4), kinds={"b": {"dense"}})
    assert sites["w"].weight.layers == sites["v"].weight.layers == 6
    assert sites["w"].canonical_inputs(jnp.zeros((6, 7, 4))).shape == (6, 7, 4)


def test_an_ensemble_on_shared_inputs():
    ensemble = jax.vmap(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], in_axes=(0, None))
    params = {"w": normal(6, 4, 5), "b": normal(6, 5), "v": normal(6, 5, 2)}
    check_capture(ensemble, params, normal(7, 4))


def experts():
    shapes = {"router": (4, 3), "up": (3, 4, 5), "b": (3, 5), "down": (3, 5, 4)}
    return {name: normal(*shape) for name, shape in shapes.items()}


def test_a_mixture_of_experts_has_one_block_per_expert():
    def apply(params, x):
        weights = jax.nn.softmax(x @ params["router"])
        hidden = jnp.einsum("btd,edf->ebtf", x, params["up"]) + params["b"][:, None, None]
        out = jnp.einsum("ebtf,efd->ebtd", jax.nn.gelu(hidden), params["down"])
        return jnp.einsum("ebtd,bte->btd", out, weights)

    sites = check_capture(apply, experts(), normal(2, 3, 4))
    assert sites["down"].weight.layers == 3


def test_routed_experts_by_dispatch():
    def apply(params, x):
        gates = jax.nn.softmax(x @ params["router"])
        top, chosen = lax.top_k(gates, 2)
        dispatch = jax.nn.one_hot(chosen, 3, dtype=x.dtype)
        slots = jnp.einsum("nke,nd->ekd", dispatch, x)
        hidden = jax.nn.relu(jnp.einsum("ekd,edf->ekf", slots, params["up"]) + params["b"][:, None])
        y = jnp.einsum("ekf,efd->ekd", hidden, params["down"])
        return jnp.einsum("ekd,nke,nk->nd", y, dispatch, top)

    sites = check_capture(apply, experts(), normal(6, 4), kinds={"b": {"dense"}})
    assert sites["up"].weight.layers == 3
