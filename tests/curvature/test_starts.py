"""Where leading eigenvectors begin: at an earlier curvature's, by the names of the blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import (
    Factorize,
    Kronecker,
    eigenbases,
    estimate,
    estimate_in_groups,
    kfac,
    subspace,
)
from jedit.curvature.layout import is_same_matrix
from jedit.curvature.likelihoods import Categorical
from jedit.tracing import Weight

SHAPES = {"w": (40, 30), "u": (30, 5), "v": (30, 6), "b": (6,)}
RANK = 4


def apply(params, x):
    """Two matrices read one input, one of them with a bias."""
    hidden = jnp.tanh(x @ params["w"])
    first, last = hidden @ params["u"], hidden @ params["v"]
    return jnp.concatenate([first, last + jnp.broadcast_to(params["b"], last.shape)], axis=-1)


@pytest.fixture(scope="module")
def taken():
    """Estimates a curvature of the model."""
    rng = np.random.default_rng(4)
    params = {n: jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, float) for n, s in SHAPES.items()}
    batch = Batch(jnp.asarray(rng.normal(size=(50, 40)), float))

    def curvature(select=None, model=apply, **how):
        made = kfac(model, Categorical(), select=select, factorize=Factorize(rank=RANK, **how))
        return estimate(made, params, batch, key=jax.random.key(0))

    return curvature


@pytest.fixture
def begun(monkeypatch):
    """What each iteration started from, by the side of its matrix."""
    found = {}
    leading = subspace.leading

    def watched(matrix, rank, start=None):
        found[matrix.shape[-1]] = start
        return leading(matrix, rank, start)

    monkeypatch.setattr(eigenbases, "leading", watched)
    monkeypatch.setattr(subspace, "num_columns", lambda rank: rank + 2)
    return found


def test_another_selection_of_parameters_finds_its_start(taken, begun):
    """The first reader of an input, by which its factor is named, is another one."""
    first = taken(select="^(v|b)$")
    again = taken(select="^(u|v|b)$", start=first)
    block, known = again.blocks["v"], first.blocks["v"]
    assert isinstance(block, Kronecker)
    assert block.input != known.input
    start = first.factors[known.input].basis
    np.testing.assert_array_equal(np.asarray(begun[31]), np.asarray(start))
    # The other one has no bias, and so a moment of its own, of which the start knows nothing.
    assert begun[30] is None


def test_a_block_of_another_matrix_is_refused_before_any_batch(taken):
    def one_half(params, x):
        halves = jnp.split(params["w"], 2, axis=1)
        return jnp.tanh(x @ halves[0]) @ params["u"][:15] + (x @ halves[1]) @ params["u"][15:]

    for how in ({}, {"streamed": True}):
        start = taken(select="^(w|u)$", **how)
        with pytest.raises(ValueError, match=r"block of 'w' is of other .*, 40 x 30 .* 40 x 15"):
            taken(select="^(w|u)$", model=one_half, start=start, **how)
        without = taken(select="^v$", **how)
        with pytest.raises(ValueError, match=r"30 x 6 with no bias, .* the bias 'b': start from"):
            taken(select="^(v|b)$", start=without, **how)


def test_a_block_of_the_last_group_is_refused_before_the_first_is_summed(taken):
    """The groups are "w" and, sharing an input, "u" with "v"; the last has no bias in the start."""
    start = taken(select="^(w|v)$")
    rng = np.random.default_rng(5)
    params = {n: jnp.asarray(rng.normal(size=s), float) for n, s in SHAPES.items()}
    made = kfac(apply, Categorical(), factorize=Factorize(rank=RANK, start=start))
    batch, key = Batch(jnp.ones((2, 40))), jax.random.key(1)
    with pytest.raises(ValueError, match=r"30 x 6 with no bias, .* the bias 'b': start from"):
        estimate_in_groups(made, params, batch, key=key, group_bytes=1)


def test_one_matrix_in_other_words_is_the_same():
    """There and back is the same, there alone the transpose, and so much of another leaf is not."""
    turn = ("transpose", (1, 0))
    plain = Weight("w", (5, 5), (), 1, False, 5, 5)
    assert is_same_matrix(plain, dataclasses.replace(plain, ops=(turn, turn)))
    assert not is_same_matrix(plain, dataclasses.replace(plain, ops=(turn,)))
    assert not is_same_matrix(plain, dataclasses.replace(plain, path="v"))
