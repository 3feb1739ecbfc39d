"""Leaving the largest entries of a whole change out, against NumPy's sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from jedit.edits import Edit, LowRank, dense, without_top_fraction
from jedit.tracing.sites import Weight


@pytest.mark.parametrize("fraction", [0.0, 0.08, 0.4, 1.0])
def test_the_largest_entries_of_a_whole_change_are_left_out(fraction):
    """Against NumPy's sort, block by block; the rest and the largest add up to the edit."""
    rng = np.random.default_rng(2)
    shapes = {"w": (7, 5), "v": (3, 4, 2), "b": (6,)}
    blocks = {n: jnp.asarray(rng.normal(size=s) * s[0] ** 2) for n, s in shapes.items()}
    thin = LowRank(
        jnp.asarray(rng.normal(size=(1, 6, 2))),
        jnp.asarray(rng.normal(size=(1, 2, 5))),
        Weight("u", (6, 5), (), 1, False, 6, 5),
    )
    edit = Edit(blocks | {"u": thin})
    rest = without_top_fraction(edit, fraction)
    for path, block in edit.blocks.items():
        expected = np.array(dense(block))
        flat = expected.reshape(-1)
        flat[np.argsort(-np.abs(flat))[: round(fraction * flat.size)]] = 0
        np.testing.assert_array_equal(rest.blocks[path], flat.reshape(expected.shape))
    top = edit - rest
    both = top + rest
    for path in edit.blocks:
        np.testing.assert_allclose(dense(both.blocks[path]), dense(edit.blocks[path]), rtol=1e-6)


def test_eight_hundredths_of_the_change_is_the_papers_share_and_dtypes_stay():
    edit = Edit({"w": jnp.arange(100.0, dtype=jnp.bfloat16) + 1})
    rest = without_top_fraction(edit).blocks["w"]
    assert rest.dtype == jnp.bfloat16
    assert np.flatnonzero(np.asarray(rest) == 0).tolist() == list(range(92, 100))
    with pytest.raises(ValueError, match="fraction must be from 0 to 1"):
        without_top_fraction(edit, 1.5)
    with pytest.raises(FloatingPointError, match="largest entries cannot be told"):
        without_top_fraction(Edit({"w": jnp.asarray([1.0, jnp.nan])}))
