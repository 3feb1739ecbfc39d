"""Embedding sites: tables read by integer indices, in range or not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.tracing import capture, find_sites
from tests.tracing.oracle import check_capture, normal

IDS = np.array([[1, 4, 0, 1], [2, -1, 4, -5]])
BEYOND = np.array([[1, 7, 0, 5], [-6, -1, -9, 4]])
EMBEDDING = {"e": {"embedding"}}


@pytest.mark.parametrize("ids", [IDS, BEYOND], ids=["in range", "beyond"])
@pytest.mark.parametrize("mode", ["clip", "wrap", "fill"])
def test_take(mode, ids):
    fill = {"fill_value": 0.0} if mode == "fill" else {}

    def apply(params, ids):
        return jnp.tanh(jnp.take(params["e"], ids, axis=0, mode=mode, **fill) @ params["w"])

    check_capture(apply, {"e": normal(5, 3), "w": normal(3, 2)}, ids, kinds=EMBEDDING)


@pytest.mark.parametrize("ids", [IDS, BEYOND], ids=["in range", "beyond"])
@pytest.mark.parametrize("mode", [None, "clip", "drop", "fill"])
def test_indexing(mode, ids):
    def apply(params, ids):
        rows = (
            params["e"][ids] if mode is None else params["e"].at[ids].get(mode=mode, fill_value=0)
        )
        return jnp.sin(rows)

    check_capture(apply, {"e": normal(5, 3)}, ids, kinds=EMBEDDING)


def test_indices_promised_to_be_in_range():
    def apply(params, ids):
        return jnp.sin(params["e"].at[ids].get(mode="promise_in_bounds"))

    check_capture(apply, {"e": normal(5, 3)}, IDS % 5, kinds=EMBEDDING)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
def test_small_and_unsigned_indices(dtype):
    def apply(params, ids):
        return params["e"].at[ids].get(mode="fill", fill_value=0)

    ids = np.array([[0, 100, 5], [3, 120, 99]]).astype(dtype)
    check_capture(apply, {"e": normal(100, 2)}, ids, kinds=EMBEDDING)


def test_rows_of_several_axes_and_another_axis():
    def apply(params, ids):
        rows = jnp.take(params["e"], ids, axis=1)
        return jnp.moveaxis(rows, 0, -1) * params["g"]

    params = {"e": normal(3, 5, 2), "g": normal(2, 3)}
    sites = check_capture(apply, params, IDS % 5, kinds=EMBEDDING)
    assert (sites["e"].weight.d_in, sites["e"].weight.d_out) == (5, 6)


def test_canonical_inputs_are_the_indices():
    def apply(params, ids):
        return params["e"][ids]

    params = {"e": normal(5, 3)}
    site = find_sites(apply, params, IDS % 5)["e"]
    _, activations, _ = capture(apply, params, IDS % 5)
    np.testing.assert_array_equal(site.canonical_inputs(activations["e"])[0], IDS % 5)


def test_tied_table_with_scale_and_positions():
    def apply(params, ids):
        h = params["e"][ids] * jnp.sqrt(3.0).astype(params["e"].dtype)
        h = jnp.tanh((h + params["position"][: ids.shape[1]]) @ params["w"])
        return h @ params["e"].T

    params = {"e": normal(5, 3), "w": normal(3, 3), "position": normal(6, 3)}
    sites = check_capture(apply, params, IDS % 5, kinds={"e": {"embedding", "dense"}})
    assert sites["e"].source.startswith("test_embedding.py")


def test_positions_by_constant_indices():
    def apply(params, ids):
        return jnp.tanh(params["e"][ids] + params["p"][jnp.arange(ids.shape[1])]) @ params["w"]

    params = {"e": normal(5, 3), "p": normal(6, 3), "w": normal(3, 3)}
    check_capture(apply, params, IDS % 5, kinds={"p": {"embedding"}})


def test_vmapped_over_examples_and_over_tables():
    def model(params, ids):
        return jnp.tanh(params["e"][ids]) @ params["w"]

    params = {"e": normal(5, 3), "w": normal(3, 3)}
    check_capture(jax.vmap(model, in_axes=(None, 0)), params, IDS % 5, kinds=EMBEDDING)
    stacked = {"e": normal(2, 5, 3), "w": normal(2, 3, 3)}
    sites = check_capture(jax.vmap(model), stacked, IDS % 5, kinds=EMBEDDING)
    assert sites["e"].weight.layers == 2


MAPPED = {
    "rows": lambda e: jax.vmap(lambda i: e[i]),
    "columns": lambda e: jax.vmap(lambda i: e.T[:, i]),
    "entries": lambda e: (
        lambda ids: jax.vmap(jax.vmap(lambda column, i: column[i], (1, None)), (None, 0))(e, ids)
    ),
    "entries, tokens first": lambda e: (
        lambda ids: jax.vmap(jax.vmap(lambda column, i: column[i], (None, 0)), (1, None), 1)(e, ids)
    ),
    "one row of one": lambda e: jax.vmap(lambda i: e[:1][i] + e[:, :1][i]),
    "fill": lambda e: jax.vmap(lambda i: e.at[i].get(mode="fill", fill_value=0)),
}


@pytest.mark.parametrize("name", MAPPED)
def test_a_lookup_of_one_token_mapped_over_tokens(name):
    def apply(params, ids):
        h = jax.vmap(MAPPED[name](params["e"]))(ids)
        return jnp.tanh(h) @ params["e"].T

    kinds = {"e": {"embedding", "dense"}}
    check_capture(apply, {"e": normal(5, 3)}, BEYOND, kinds=kinds)


class Tied(eqx.Module):
    embedding: eqx.nn.Embedding
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(5, 3, key=key)
        self.linear = eqx.nn.Linear(3, 3, key=key)

    def __call__(self, ids):
        h = jax.vmap(lambda i: jnp.tanh(self.linear(self.embedding(i))))(ids)
        return h @ self.embedding.weight.T


def test_equinox_as_it_comes():
    params, static = eqx.partition(Tied(jax.random.key(0)), eqx.is_array)
    params = jax.tree.map(lambda x: normal(*x.shape), params)
    sites = check_capture(
        lambda p, ids: jax.vmap(eqx.combine(p, static))(ids),
        params,
        IDS % 5,
        kinds={"embedding/weight": {"embedding", "dense"}},
    )
    assert sites["embedding/weight"].weight.d_in == 5
    assert "2 x" not in str(sites)


def test_tables_and_tokens_mapped_together():
    def apply(params, ids):
        one = jax.vmap(lambda e, i: e[i], (None, 0))
        return jnp.sin(jax.vmap(one)(params["e"], ids))

    sites = check_capture(apply, {"e": normal(2, 5, 3)}, IDS % 5, kinds=EMBEDDING)
    assert sites["e"].weight.layers == 2


def test_a_table_inside_a_scan_and_a_stack_of_tables():
    def apply(params, ids):
        def step(h, ids_and_table):
            now, table = ids_and_table
            return jnp.tanh(h + params["e"][now] + table[now]), None

        return jax.lax.scan(step, jnp.zeros((2, 3)), (ids.T, params["stack"]))[0]

    params = {"e": normal(5, 3), "stack": normal(4, 5, 3)}
    sites = check_capture(apply, params, IDS % 5)
    assert sites["e"].num_uses == 4
    assert sites["stack"].weight.layers == 4


def test_a_choice_of_single_entries_is_uncovered():
    def apply(params, ids):
        return params["e"][ids, ids % 3] + params["f"][ids][..., 0]

    params = {"e": normal(5, 3), "f": normal(5, 3)}
    sites = check_capture(apply, params, IDS % 5, uncovered=("e",))
    assert "other than whole rows" in sites.uncovered["e"]
