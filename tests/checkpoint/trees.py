"""Small edits and curvatures, and a comparison of trees that is exact."""

import jax
import jax.numpy as jnp
import numpy as np

from jedit.curvature import Curvature, Diagonal, Factor, Kronecker
from jedit.edits import Edit, LowRank
from jedit.tracing.sites import Weight

PLAIN = Weight("a/kernel", (3, 2), (), 1, False, 3, 2)
STACKED = Weight("b|w", (2, 4, 2), (("layer", 0), ("reshape", (2, 2, 2)),
                 ("transpose", (1, 0, 2)), ("reshape", (4, 2))), 2, True, 4, 2)  # fmt: skip
SLICED = Weight("c", (4, 3), (("slice", (0, 1), (4, 3), None),), 1, False, 4, 2, "d", (2,), ())


def numbers(*shape, dtype="float32", seed=0):
    """Numbers without a pattern, drawn by NumPy."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(values.astype(np.float32)).astype(dtype)


def make_edit(seed=0):
    """Dense and thin, in several dtypes, with odd names and numbers."""
    special = np.array([np.nan, -0.0, np.inf, 1e-42], np.float32)
    return Edit(
        {
            "z": numbers(2, 3, dtype="bfloat16", seed=seed),
            "a/kernel": LowRank(numbers(1, 3, 2, seed=seed), numbers(1, 2, 2), PLAIN),
            "../é": jnp.asarray(special),
            "b|w": LowRank(
                numbers(2, 4, 1, dtype="bfloat16"), numbers(2, 1, 2, dtype="bfloat16"), STACKED
            ),
            "empty": jnp.zeros((0, 3)),
            "scalar": jnp.float16(0.5),
        }
    )


def make_curvature():
    """Corrected, uncorrected and diagonal blocks, a shared and a diagonal factor."""
    factors = {
        "in": Factor(numbers(1, 3, 3), numbers(1, 3, 3, seed=1), jnp.abs(numbers(1, 3))),
        "out": Factor(numbers(1, 2, 2), numbers(1, 2, 2, seed=1), jnp.abs(numbers(1, 2))),
        "ids": Factor(numbers(2, 4), None, numbers(2, 4)),
        "outs": Factor(numbers(2, 2, 2), numbers(2, 2, 2, seed=1), numbers(2, 2)),
    }
    blocks = {
        "b|w": Kronecker(STACKED, "ids", "outs", is_merged=True),
        "a/kernel": Kronecker(PLAIN, "in", "out", numbers(1, 3, 2)),
        "c#1": Diagonal(SLICED, numbers(1, 5, 2)),
    }
    return Curvature(blocks, factors, jnp.asarray(7))


def assert_same(actual, expected):
    """The same structure, names in the same order, and every array the same to the bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for name in ("blocks", "factors"):
        if hasattr(expected, name):
            assert list(getattr(actual, name)) == list(getattr(expected, name))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
