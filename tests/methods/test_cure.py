"""CURE: effects against parameters set to zero, and a step of each group against its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core import row_blocks
from jedit.core.batch import Batch
from jedit.methods import ModuleEffects, _making, cure, module_effects, rosu
from jedit.objectives import GA, RetainNLL
from jedit.training import unlearn

VOCAB, WIDTH = 7, 5


def network(params, tokens):
    hidden = params["embed"][tokens] + params["positions"][None]
    hidden = hidden + jnp.tanh(hidden @ params["in"] + params["bias"][None, None]) @ params["out"]
    return hidden * params["gain"][None, None] @ params["head"]


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(6)
    shapes = {
        "embed": (VOCAB, WIDTH), "in": (WIDTH, 6), "bias": (6,), "out": (6, WIDTH),
        "gain": (WIDTH,), "head": (WIDTH, VOCAB), "positions": (4, WIDTH),
    }  # fmt: skip
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def rows(count):
        tokens, targets = rng.integers(0, VOCAB, (2, count, 4))
        return Batch(jnp.asarray(tokens), jnp.asarray(targets), jnp.asarray(targets > 0))

    return params, rows(6), rows(9)


def loss(params, rows):
    return RetainNLL()(network, params, None, rows)[0]


def test_an_effect_is_that_of_the_parameter_set_to_zero(scene, tolerance):
    """A product or a look-up is zero where its matrix is; a bias that comes after it stays.

    What is added to the stream, here positions, is no module: its output is the whole stream.
    """
    params, forget, retain = scene
    effects = module_effects(network, params, forget, retain, chunk=3)
    assert effects.names == ("embed", "in", "out", "gain", "head")
    assert dict(zip(effects.names, effects.paths, strict=True))["in"] == ("in", "bias")
    for found, rows in ((effects.forget, forget), (effects.retain, retain)):
        off = [loss({**params, n: jnp.zeros_like(params[n])}, rows) for n in effects.names]
        tolerance.check(found, np.stack(off) - loss(params, rows))


def test_large_outputs_are_taken_in_blocks_of_rows(scene, monkeypatch, tolerance):
    params, forget, retain = scene
    whole = module_effects(network, params, forget, retain)
    monkeypatch.setattr(row_blocks, "MOST_BYTES", 1)  # a row each

    def again(params, tokens):
        assert len(tokens) in (1, 6, 9)
        return network(params, tokens)

    blocks = module_effects(again, params, forget, retain)
    tolerance.check(blocks.forget, whole.forget)
    tolerance.check(blocks.retain, whole.retain)


def test_a_few_rows_are_from_all_over_the_set():
    rows = _making._spread(Batch(jnp.arange(40), jnp.arange(40)), 16)
    assert len(rows.inputs) == _making.PATCHED == 16
    assert (rows.inputs[0], rows.inputs[-1]) == (0, 39)
    assert np.all(np.diff(rows.inputs) >= 2)
    assert np.all(_making._spread(Batch(jnp.arange(5), jnp.arange(5)), 16).inputs == np.arange(5))


def test_groups_are_of_shares_of_all_effects():
    names = tuple("abcdef")
    paths = (("a", "a_bias"), ("b",), ("c",), ("d",), ("c",), ("f",))
    forget = np.array([3.0, 1.0, 1.0, -2.0, 1.0, 1e-7])
    retain = np.array([1.0, 30.0, 9.0, 0.0, 0.0, -1e-7])
    effects = ModuleEffects(names, paths, jnp.asarray(forget), jnp.asarray(retain))
    f, r = (np.maximum(x, 0) / np.maximum(x, 0).sum() for x in (forget, retain))
    both = np.where(f + r > 0, f + r, 1)
    expected = (f - r) / both
    expected[5] = 0  # its rises are rounding, which no rule may go by
    np.testing.assert_allclose(effects.specificity, expected, rtol=1e-5)
    groups = {"a": "forget", "a_bias": "forget", "b": "retain", "d": "shared", "f": "shared"}
    # "c" stands in two modules: 2/6 of the one loss, 9/40 of the other.
    assert effects.groups(0.1) == {**groups, "c": "forget"}
    assert effects.groups(0.5) == {**groups, "c": "shared"}


@pytest.mark.parametrize("is_conflict", [True, False])
def test_a_step_goes_by_each_groups_rule(scene, is_conflict, key, tolerance):
    params, forget, retain = scene
    # "in" serves forgetting, "out" retaining, the tables both; of the gain nothing is known.
    names = ("in", "out", "embed", "head")
    effects = ModuleEffects(
        names,
        (("in", "bias"), ("out",), ("embed",), ("head",)),
        jnp.array([9.0, 1.0, 5.0, 5.0]),
        jnp.array([1.0, 9.0, 5.0, 5.0]),
    )
    sign = 1.0
    g_f, g_r = (jax.grad(loss)(params, rows) for rows in (forget, retain))
    shared = ("embed", "gain", "head", "positions")
    dot = lambda x, y: float(sum(np.vdot(x[n], y[n]) for n in shared))  # noqa: E731
    if (dot(g_f, g_r) > 0) is not is_conflict:  # ascent conflicts where descents agree
        sign = -1.0

    def objective(apply, params, forget, *_):
        value, aux = GA()(apply, params, forget)
        return sign * value, aux

    wanted = jax.tree.map(lambda g: -sign * np.asarray(g, np.float64), g_f)
    g_r = jax.tree.map(lambda g: np.asarray(g, np.float64), g_r)
    assert (dot(wanted, g_r) < 0) is is_conflict
    part = min(dot(wanted, g_r), 0) / dot(g_r, g_r)
    expected = {
        **{name: wanted[name] for name in ("in", "bias")},
        "out": g_r["out"],
        **{name: g_r[name] + wanted[name] - part * g_r[name] for name in shared},
    }
    method = cure(effects, optax.sgd(0.2), objective=objective)._replace(batch_size=16)
    moved, history = unlearn(method, network, params, forget, retain, steps=1, key=key)
    tolerance.check(moved, {n: params[n] - 0.2 * expected[n] for n in params})
    tolerance.check(history["loss"][0], loss(params, retain))


def test_integers_stand_beside_what_is_trained(scene, key):
    params, forget, retain = scene
    effects = ModuleEffects(("head",), (("head",),), jnp.ones(1), jnp.ones(1))
    given = {**params, "count": jnp.arange(3)}
    for i, method in enumerate((cure(effects, optax.sgd(0.1)), rosu(optax.sgd(0.1), radius=0.01))):
        sets, order = (forget, retain), jax.random.fold_in(key, i)
        moved, _ = unlearn(
            method._replace(batch_size=16), network, given, *sets, steps=1, key=order
        )
        np.testing.assert_array_equal(moved["count"], given["count"])
        assert np.any(np.asarray(moved["head"] != params["head"]))


def test_what_it_cannot_do_without_is_said(scene):
    params, *_ = scene
    effects = ModuleEffects(("head",), (("head",),), jnp.ones(1), jnp.ones(1))
    optimizer = cure(effects, optax.sgd(0.1)).optimizer
    with pytest.raises(ValueError, match="forget_grads"):
        optimizer.update(params, optimizer.init(params), params)
    rows = Batch(jnp.ones((2, 3)), jnp.zeros(2, int))
    with pytest.raises(ValueError, match="no module to be patched"):
        module_effects(lambda p, x: jnp.sin(x) ** p["a"], {"a": jnp.ones(())}, rows, rows)
