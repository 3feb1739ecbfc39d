"""Packing against the padded rows: every token once, and the same number from every metric."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from jedit.core.batch import Batch
from jedit.curvature import estimate, factors, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.curvature.types import Diagonal
from jedit.data import batches, pack
from jedit.metrics import (
    accuracy,
    answer_nll_per_row,
    answer_nll_sum_per_row,
    answer_probability,
    exact_memorization,
    extraction_strength,
    gradient_norm_scores,
    min_k_scores,
    nll,
    output_kl,
)
from jedit.models import gpt
from jedit.objectives import NPO, SimNPO

VOCAB = 11
KERNELS = r"embed/|blocks/.*/kernel|head"


def rows_of(sizes, width, seed=0):
    """Random rows of these lengths; garbage on padding, a mask without each row's first token."""
    rng = np.random.default_rng(seed)
    shape = (len(sizes), width)
    is_token = np.arange(width)[None] < np.asarray(sizes)[:, None]
    tokens, targets = np.random.default_rng(99).integers(0, VOCAB, (2, *shape))
    drawn = rng.integers(0, VOCAB, (2, len(sizes), max(sizes)))
    tokens[:, : max(sizes)], targets[:, : max(sizes)] = np.where(
        is_token[None, :, : max(sizes)], drawn, (tokens[:, : max(sizes)], targets[:, : max(sizes)])
    )
    mask = is_token & (np.arange(width)[None] > 0)
    return Batch(
        jnp.asarray(tokens, np.int32),
        jnp.asarray(targets, np.int32),
        jnp.asarray(mask, np.float32),
        jnp.asarray(is_token, np.float32),
    )


@st.composite
def sizes_and_length(draw):
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    return sizes, draw(st.integers(max(sizes), 20))


@given(sizes_and_length())
@settings(max_examples=60)
def test_packing_is_a_permutation(case):
    sizes, length = case
    rows = rows_of(sizes, 10)
    batch, index = packing = pack(rows, length)
    valid = np.asarray(rows.valid) > 0
    # Every token has one place, and every place that is no padding has one token.
    places = np.asarray(index)[valid]
    assert len(set(places.tolist())) == valid.sum() == np.asarray(batch.valid).sum()
    assert np.all(np.asarray(index)[~valid] == -1)
    for name in ("targets", "mask", "valid"):
        want = np.where(valid, getattr(rows, name), 0)
        assert_array_equal(packing.unpack(getattr(batch, name)), want)
    for values, want in (
        (batch.inputs.tokens, np.asarray(rows.inputs)),
        (batch.inputs.positions, np.arange(10)[None]),
        (batch.inputs.segments, np.arange(1, len(sizes) + 1)[:, None]),
    ):
        assert_array_equal(packing.unpack(values), np.where(valid, want, 0))
    # A row lies in one sequence, in its order; what is left is zero.
    for row, size in zip(np.asarray(index), sizes, strict=True):
        assert np.all(np.diff(row[:size]) == 1)
        assert size == 0 or row[0] // length == row[size - 1] // length
    for leaf in jax.tree.leaves(batch):
        assert leaf.shape[1] == length
        assert not np.any(np.asarray(leaf)[np.asarray(batch.valid) == 0])
    assert len(batch.valid) <= 11 / 9 * -(-sum(sizes) // length) * 2 + 1
    assert np.asarray(batch.valid).any(axis=1).all()


def test_first_fit_decreasing_by_hand():
    packing = pack(rows_of([3, 6, 2, 5], 6), 8)
    assert_array_equal(
        packing.batch.inputs.segments, [[2, 2, 2, 2, 2, 2, 3, 3], [4, 4, 4, 4, 4, 1, 1, 1]]
    )
    assert_array_equal(
        packing.batch.inputs.positions, [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2]]
    )
    assert_array_equal(packing.index[2], [6, 7, -1, -1, -1, -1])


def test_more_axes_and_fields_that_are_none():
    rows = rows_of([2, 3], 3)
    packing = pack(Batch(rows.inputs, None, None, rows.valid), 5)
    assert packing.batch.targets is None
    assert packing.batch.mask is None
    values = np.arange(10.0).reshape(1, 5, 2)
    got = packing.unpack(jnp.asarray(values))
    assert_array_equal(got, [[[6, 7], [8, 9], [0, 0]], [[0, 1], [2, 3], [4, 5]]])
    assert_array_equal(jax.jit(lambda p, x: p.unpack(x))(packing, jnp.asarray(values)), got)
    full = pack(Batch(rows.inputs), 6)
    assert_array_equal(full.batch.valid, np.ones((1, 6)))
    dense = pack(rows._replace(targets=jnp.asarray(np.arange(12.0).reshape(2, 3, 2))), 3)
    assert_array_equal(dense.batch.targets[0], np.arange(12.0).reshape(2, 3, 2)[1])


@pytest.mark.parametrize(
    ("change", "length", "message"),
    [
        ({}, 4, r"row 1 is 5 tokens long, more than length = 4 \(as are 2 of 3 rows\)"),
        ({"inputs": np.zeros((3, 6))}, 8, r"integers of shape \(n, width\); got float64"),
        ({"inputs": np.zeros(3, int)}, 8, r"got int64 of shape \(3,\)"),
        ({"mask": np.ones(3)}, 8, r"mask has shape \(3,\), but the tokens have \(3, 6\)"),
        ({"valid": np.tile([1, 0, 1, 0, 0, 0], (3, 1))}, 8, "row 0 has a valid token behind"),
        ({"valid": np.zeros((3, 6))}, 8, "nothing to pack"),
    ],
)
def test_what_cannot_be_packed(change, length, message):
    with pytest.raises(ValueError, match=message):
        pack(rows_of([2, 5, 5], 6)._replace(**change), length)


def test_misuse_is_refused():
    packing = pack(rows_of([2, 5], 6), 8)
    with pytest.raises(ValueError, match="packed already"):
        pack(packing.batch, 8)
    with pytest.raises(ValueError, match=r"expected values of shape \(1, 8, '...'\), got \(2, 6\)"):
        packing.unpack(jnp.zeros((2, 6)))


@pytest.fixture(scope="module")
def model():
    dtype = jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32
    apply, params = gpt(
        key=jax.random.key(3), vocab=VOCAB, width=8, num_layers=2, num_heads=2, max_len=12,
        dtype=dtype,
    )  # fmt: skip
    rng = np.random.default_rng(5)
    shifted = [
        jax.tree.map(lambda x: x + jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype), params)
        for _ in range(2)
    ]
    return apply, *shifted


SIZES = [3, 7, 1, 5, 2, 6, 4, 0, 2]


def three_ways():
    """The same rows padded, padded more, and packed to sequences longer than the positions."""
    return rows_of(SIZES, 7), rows_of(SIZES, 11), pack(rows_of(SIZES, 7), 13).batch


def test_the_model_sees_rows_alone(model, tolerance):
    apply, params, _ = model
    rows = rows_of(SIZES, 7)
    packing = pack(rows, 13)
    assert len(packing.batch.valid) == 3
    got = packing.unpack(jax.jit(apply)(params, packing.batch.inputs))
    want = jnp.where(rows.valid[..., None] > 0, apply(params, rows.inputs), 0)
    tolerance.check(got, want)


def test_sums_over_tokens_are_the_same(model, tolerance):
    apply, params, other = model
    padded, wider, packed = three_ways()
    for metric in (
        lambda data: nll(apply, params, data),
        lambda data: accuracy(apply, params, data),
        lambda data: output_kl(apply, params, other, data),
    ):
        want = metric(padded)
        assert want > 0
        for data in (wider, packed, list(batches(packed, 2)), list(batches(padded, 4))):
            tolerance.check(metric(data), want)


def test_rows_keep_their_numbers_and_their_order(model, tolerance):
    apply, params, _ = model
    padded, wider, packed = three_ways()
    for metric in (answer_nll_per_row, answer_nll_sum_per_row, exact_memorization):
        want = metric(apply, params, padded)
        assert want.shape == (7,)  # one row is empty, one has nothing but its unmasked token
        for data in (wider, packed, list(batches(packed, 2, order=np.array([2, 0, 1])))):
            tolerance.check(metric(apply, params, data), want)
    want = answer_probability(answer_nll_per_row(apply, params, padded))
    tolerance.check(answer_probability(answer_nll_per_row(apply, params, packed)), want)


def test_what_looks_at_examples_refuses(model):
    apply, params, _ = model
    padded, _, packed = three_ways()
    with pytest.raises(ValueError, match="some of the batches are packed"):
        answer_nll_per_row(apply, params, [padded, packed])
    for refused in (
        lambda: extraction_strength(apply, params, packed),
        lambda: min_k_scores(apply, params, packed),
        lambda: gradient_norm_scores(apply, params, packed),
        lambda: NPO()(apply, params, packed, None, params),
        lambda: SimNPO()(apply, params, packed),
    ):
        with pytest.raises(ValueError, match="packed batch has several in one sequence"):
            refused()


@pytest.mark.parametrize(
    ("fisher", "select"), [("exact", f"{KERNELS}|bias|scale"), ("empirical", KERNELS)]
)
def test_curvature_is_the_same(model, tolerance, key, fisher, select):
    """With given labels a vector's block squares sums over examples, which are others."""
    apply, params, _ = model
    estimator = kfac(apply, Categorical(), fisher=fisher, select=select)
    padded, wider, packed = three_ways()
    want = estimate(estimator, params, [padded], key=key)
    for data in ([wider], [packed], batches(packed, 2)):
        got = estimate(estimator, params, data, key=key)
        assert int(got.num_outputs) == int(want.num_outputs)
        tolerance.check(arrays_of(got), arrays_of(want))
        if fisher == "exact":
            assert sum("norm" in name for name in want.blocks) == 10


def arrays_of(curvature):
    """By parameter its factors, or its diagonal: no eigenvectors, whose signs are nobody's."""
    return {
        name: block.values if isinstance(block, Diagonal) else factors(curvature, name)
        for name, block in curvature.blocks.items()
    }
