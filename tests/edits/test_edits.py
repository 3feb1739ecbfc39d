"""Edits: arithmetic, reversal, failures, and behaviour under jit, vmap and donation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.edits import (
    Edit,
    apply_edit,
    cast_report,
    edit_between,
    edit_norms,
    revert_edit,
)


def make_params(key, dtype=None):
    keys = jax.random.split(key, 3)
    params = {
        "layers": [
            {"kernel": jax.random.normal(keys[i], (4, 3)), "bias": jnp.ones(3)} for i in (0, 1)
        ],
        "out": jax.random.normal(keys[2], (3, 5)),
    }
    return params if dtype is None else jax.tree.map(lambda p: p.astype(dtype), params)


def make_edit(key, shape=(4, 3)):
    k_kernel, k_out = jax.random.split(key)
    return Edit(
        {
            "layers/1/kernel": jax.random.normal(k_kernel, shape),
            "out": jax.random.normal(k_out, (3, 5)),
        }
    )


@pytest.fixture
def problem():
    k_params, k_edit = jax.random.split(jax.random.key(5))
    return make_params(k_params), make_edit(k_edit)


def test_apply_adds_at_its_paths_and_nowhere_else(problem, tolerance):
    params, edit = problem
    edited = apply_edit(params, edit, scale=-0.3)
    expected = jax.tree.map(np.asarray, params)
    expected["layers"][1]["kernel"] = expected["layers"][1]["kernel"] - 0.3 * np.asarray(
        edit.blocks["layers/1/kernel"]
    )
    expected["out"] = expected["out"] - 0.3 * np.asarray(edit.blocks["out"])
    tolerance.check(edited, expected, "rounding")
    for untouched in (lambda p: p["layers"][0], lambda p: p["layers"][1]["bias"]):
        jax.tree.map(np.testing.assert_array_equal, untouched(edited), untouched(params))


def test_revert_undoes_apply_to_one_rounding(problem):
    params, edit = problem
    edited = apply_edit(params, edit, scale=0.7)
    restored = revert_edit(edited, edit, scale=0.7)
    for old, middle, new in zip(*map(jax.tree.leaves, (params, edited, restored)), strict=True):
        unit = np.spacing(np.maximum(np.abs(old), np.abs(middle)))
        assert np.all(np.abs(np.asarray(new) - np.asarray(old)) <= unit)


def test_algebra(problem, key, tolerance):
    params, edit = problem
    other = Edit({"out": jax.random.normal(key, (3, 5)), "layers/0/bias": jnp.arange(3.0)})
    both = edit + other
    assert set(both.blocks) == {"layers/1/kernel", "layers/0/bias", "out"}
    tolerance.check(both.blocks["out"], edit.blocks["out"] + other.blocks["out"], "rounding")
    in_turn = apply_edit(apply_edit(params, edit), other)
    tolerance.check(apply_edit(params, both), in_turn, "rounding")
    tolerance.check(apply_edit(params, 2 * edit), apply_edit(params, edit, 2.0), "rounding")
    tolerance.check(apply_edit(params, edit * 2.5), apply_edit(params, edit, 2.5), "rounding")
    tolerance.check(apply_edit(params, -edit), revert_edit(params, edit), "rounding")
    tolerance.check((edit - other).blocks["layers/0/bias"], -jnp.arange(3.0), "rounding")
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), edit - edit)
    assert set(edit.blocks) == {"layers/1/kernel", "out"}  # operands are values, left as they were


def test_norms_are_frobenius(problem, tolerance):
    _, edit = problem
    expected = {path: np.linalg.norm(np.asarray(block)) for path, block in edit.blocks.items()}
    tolerance.check(edit_norms(edit), expected)


def test_edit_between_takes_one_model_to_the_other(problem, tolerance):
    params, edit = problem
    after = apply_edit(params, edit)
    whole = edit_between(params, after)
    assert len(whole.blocks) == 5
    tolerance.check(apply_edit(params, whole), after, "rounding")
    chosen = edit_between(params, after, select="kernel$")
    assert set(chosen.blocks) == {"layers/0/kernel", "layers/1/kernel"}
    tolerance.check(chosen.blocks["layers/1/kernel"], edit.blocks["layers/1/kernel"], "rounding")


def test_reapply_to_a_model_trained_further(problem, key):
    """The stored edit moves other params of the same structure by the same amount."""
    params, edit = problem
    drift = jax.tree.map(lambda p: 0.01 * p, make_params(key))
    trained = jax.tree.map(jnp.add, apply_edit(params, edit), drift)
    reapplied = apply_edit(trained, edit)
    moved = edit_between(trained, reapplied)
    for path, block in edit.blocks.items():
        np.testing.assert_allclose(moved.blocks[path], block, atol=1e-5)


def test_jit_donation_and_vmap_over_stacked_edits(problem, key, tolerance):
    params, edit = problem
    expected = apply_edit(params, edit, 0.5)
    donated = jax.jit(apply_edit, donate_argnums=0)(jax.tree.map(jnp.copy, params), edit, 0.5)
    tolerance.check(donated, expected, "rounding")
    stack = [edit, 2.0 * edit, make_edit(key)]
    stacked = jax.tree.map(lambda *blocks: jnp.stack(blocks), *stack)
    many = jax.vmap(apply_edit, in_axes=(None, 0))(params, stacked)
    for i, one in enumerate(stack):
        tolerance.check(
            jax.tree.map(lambda leaf, i=i: leaf[i], many), apply_edit(params, one), "rounding"
        )
    gradient = jax.grad(lambda s: jnp.sum(apply_edit(params, edit, s)["out"]))(1.0)
    tolerance.check(gradient, np.asarray(edit.blocks["out"]).sum())


def test_an_edit_is_a_pytree_of_its_blocks(problem):
    _, edit = problem
    assert len(jax.tree.leaves(edit)) == 2
    assert jax.tree.structure(edit) == jax.tree.structure(2.0 * edit)
    shapes = jax.tree.map(lambda block: block.shape, edit)
    assert shapes.blocks["out"] == (3, 5)
    ((path, _), *_) = jax.tree_util.tree_leaves_with_path(edit)
    assert "layers/1/kernel" in jax.tree_util.keystr(path)


def test_weights_keep_their_dtype_and_the_report_says_what_it_cost(key):
    params = make_params(key, jnp.bfloat16)
    one = jnp.ones((3, 5), jnp.bfloat16)
    params["out"] = one
    block = jnp.zeros((3, 5), jnp.float32).at[0].set(2.0**-10).at[1].set(0.25)
    edit = Edit({"out": block})
    edited = apply_edit(params, edit)
    assert edited["out"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(edited["out"][0], one[0])  # below half a unit at 1: swallowed
    np.testing.assert_array_equal(edited["out"][1], jnp.full(5, 1.25, jnp.bfloat16))
    report = cast_report(params, edit)["out"]
    assert report.swallowed == 0.5
    lost = 2.0**-10 / np.hypot(2.0**-10, 0.25)
    np.testing.assert_allclose(report.rounded_away, lost, rtol=1e-5)
    # 64 times the edit is large enough for every entry to arrive: 2^-4 and 16 are exact beside 1.
    whole = cast_report(params, edit, scale=64.0)["out"]
    assert whole == (0.0, 0.0)
    nothing = cast_report(params, Edit({"out": jnp.zeros((3, 5))}))["out"]
    assert nothing == (0.0, 0.0)


def test_sums_are_formed_in_float32(key):
    """In bfloat16 the scaled block would round before it is added."""
    params = {"w": jnp.full((64,), 1.0, jnp.bfloat16)}
    block = jax.random.normal(key, (64,), jnp.float32)
    edited = apply_edit(params, Edit({"w": block}), 0.37)
    expected = (np.float32(1) + np.float32(0.37) * np.asarray(block)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(edited["w"], expected)


def test_mistakes_get_a_sentence(problem):
    params, edit = problem
    with pytest.raises(ValueError, match=r"names 'layers/2/kernel', .*nearest: 'layers/"):
        apply_edit(params, Edit({"layers/2/kernel": jnp.zeros((4, 3))}))
    with pytest.raises(ValueError, match=r"out: the edit has shape \(5, 3\), params \(3, 5\)"):
        revert_edit(params, Edit({"out": jnp.zeros((5, 3))}))
    with pytest.raises(ValueError, match=r"out: one edit has shape \(3, 5\), the other \(5, 3\)"):
        edit + Edit({"out": jnp.zeros((5, 3))})
    with pytest.raises(ValueError, match="only real parameters"):
        apply_edit({"step": jnp.zeros(2, jnp.int32)}, Edit({"step": jnp.zeros(2)}))
    with pytest.raises(ValueError, match=r"differ in structure.*out"):
        edit_between(params, {"layers": params["layers"]})
    with pytest.raises(ValueError, match="matches no real parameter"):
        edit_between(params, params, select="attention")
    with pytest.raises(ValueError, match="share one path"):
        apply_edit({"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, edit)
