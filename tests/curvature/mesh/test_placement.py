"""Which axes of a mesh a parameter's matrix is split over, and which parameters make a group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jedit
from jedit.curvature.likelihoods import Categorical
from jedit.curvature.memory import Footprint, group_paths
from jedit.curvature.mesh.placement import along, best_split, even, factor_place, matrix_sharding
from jedit.tracing import Weight
from tests.curvature.programs import BY_NAME, exact_kfac

MESH = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def place(*spec):
    return NamedSharding(MESH, P(*spec))


@pytest.mark.parametrize(
    ("shape", "ops", "sides", "spec", "expected"),
    [
        ((8, 6), (), (1, 8, 6), ("data", "model"), (None, "data", "model")),
        ((6, 8), (("transpose", (1, 0)),), (1, 8, 6), ("model", "data"), (None, "data", "model")),
        # Heads and their features become columns: the heads' devices split them.
        ((8, 4, 3), (), (1, 8, 12), (None, "model", None), (None, None, "model")),
        # A split over the features of each head is none of contiguous columns.
        ((8, 3, 4), (), (1, 8, 12), (None, None, "model"), None),
        ((3, 8, 6), (("layer", 1),), (3, 8, 6), (None, "data", "model"), (None, "data", "model")),
        ((4, 8, 6), (("layer", 1),), (4, 8, 6), ("data",), ("data", None, None)),
        # A parameter that is cut in two has lost the axis that it was cut along.
        (
            (8, 12),
            (("slice", (0, 0), (8, 6), None),),
            (1, 8, 6),
            ("data", "model"),
            (None, "data", None),
        ),
        # One column axis made into heads: they take it.
        (
            (8, 12),
            (("reshape", (8, 4, 3)), ("transpose", (1, 0, 2))),
            (4, 8, 3),
            (None, "model"),
            ("model", None, None),
        ),
        ((8, 12), (), (1, 8, 12), (("data", "model"), None), (None, ("data", "model"), None)),
    ],
)
def test_axes_follow_the_matrix(shape, ops, sides, spec, expected):
    layers, d_in, d_out = sides
    weight = Weight("w", shape, ops, layers, layers > 1, d_in, d_out)
    found = matrix_sharding(weight, {"w": place(*spec)})
    if expected is None:
        assert found is None
        return
    assert found == place(*expected)
    flipped = matrix_sharding(weight, {"w": place(*spec)}, is_flipped=True)
    assert flipped == place(expected[0], expected[2], expected[1])
    assert matrix_sharding(weight, {}) is None


def test_only_even_axes_are_split():
    matrix = place(None, "data", "model")
    assert even(matrix, (1, 8, 6), 0, 1, 2) == matrix
    assert even(matrix, (1, 9, 6), 0, 1, 2) == place(None, None, "model")
    assert even(matrix, (1, 8, 8), 0, 1, None) == place(None, "data", None)
    # With a row for the bias, columns are split over all devices if they can be.
    assert best_split(matrix, (1, 9, 16)) == place(None, None, ("model", "data"))
    assert best_split(matrix, (1, 8, 16)) == matrix
    assert along(matrix, 1) == place(None, ("data", "model"), None)
    # A factor takes all axes along its side, or its own, or none.
    assert factor_place(matrix, (1, 8, 8), 1) == place(None, ("data", "model"), None)
    assert factor_place(matrix, (1, 8, 8), 2) == place(None, ("model", "data"), None)
    assert factor_place(matrix, (1, 12, 12), 1) == place(None, "data", None)
    assert factor_place(matrix, (1, 9), 1) == place(None, None)


def test_groups_keep_what_shares_a_sum():
    needs = [
        Footprint(("q", "q bias"), {"in x": 4, "out q": 4}),
        Footprint(("up",), {"in y": 4, "out up": 16}),
        Footprint(("k",), {"in x": 4, "out k": 4}),
        Footprint(("down",), {"in z": 16, "out down": 4}),
        Footprint(("norm",), {"norm": 1}),
        Footprint(("up",), {"in w": 1}),
    ]
    assert group_paths(needs, 1000) == (("q", "q bias", "k", "up", "down", "norm"),)
    assert group_paths(needs, 33) == (("q", "q bias", "k", "up"), ("down", "norm"))
    assert group_paths(needs, 1) == (("q", "q bias", "k"), ("up",), ("down",), ("norm",))
    with pytest.raises(ValueError, match="group_bytes must be at least 1, got 0"):
        group_paths(needs, 0)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_groups_make_the_same_curvature(kind, key, tolerance):
    program = BY_NAME["perceptron"]
    params, batch, curvature = exact_kfac(program)
    estimator = {
        "kfac": lambda: jedit.kfac(program.run, Categorical()),
        "ekfac": lambda: jedit.ekfac(program.run, Categorical(), curvature),
        "diagonal": lambda: jedit.diagonal(program.run, Categorical()),
    }[kind]()
    assert len(estimator.groups(params, batch, 1)) > 1
    whole = jedit.estimate(estimator, params, [batch], key=key)
    parts = jedit.estimate(estimator, params, [batch], key=key, group_bytes=1, offload=True)
    tolerance.check(jax.device_get(parts), jax.device_get(whole), "factorization")
    solved = [jedit.solve(c, params, damping=0.1) for c in (whole, parts)]
    tolerance.check(solved[1], solved[0], "factorization")


def test_what_cannot_be_grouped_says_so(key):
    program = BY_NAME["perceptron"]
    params, batch, _ = exact_kfac(program)
    estimator = jedit.kfac(program.run, Categorical())
    with pytest.raises(ValueError, match="once for each group, but these come only once"):
        jedit.estimate(estimator, params, iter([batch]), key=key, group_bytes=1)
    with pytest.raises(ValueError, match="estimate got no batch"):
        jedit.estimate(estimator, params, [], key=key, group_bytes=1)
    bare = estimator._replace(groups=None)
    with pytest.raises(ValueError, match="an estimator with `groups`"):
        jedit.estimate(bare, params, [batch], key=key, group_bytes=1)


def test_offloaded_matrices_are_on_the_host(key):
    program = BY_NAME["perceptron"]
    params, batch, curvature = exact_kfac(program)
    there = jedit.curvature.to_host(curvature)
    kinds = {f.basis.sharding.memory_kind for f in there.factors.values() if f.basis is not None}
    assert kinds == {"pinned_host"}
    back = jedit.curvature.to_device(there)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(curvature), strict=True):
        assert one.sharding.memory_kind == other.sharding.memory_kind
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    estimator = jedit.ekfac(program.run, Categorical(), there)
    found = jedit.estimate(estimator, params, [batch], key=key)
    assert jnp.isfinite(jedit.trace(found))
