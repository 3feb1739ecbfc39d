"""Truncations against the dense singular value decomposition."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jedit.edits import Edit, LowRank, compress, dense, truncate, truncate_all
from jedit.tracing import Weight
from tests.conftest import ROOT

RANK = 4
SHAPES = ((20, 33, 12), (33, 20, 25), (40, 40, 40), (7, 9, 6))  # d_in, d_out and the inner length
SPECTRA = {
    "flat": lambda n: np.ones(n),
    "by a fifth": lambda n: 0.8 ** np.arange(n),
    "by nine tenths": lambda n: 0.1 ** np.arange(n),
    "one far ahead": lambda n: np.where(np.arange(n) < 1, 1e3, 0.7 ** np.arange(n)),
    "few": lambda n: np.where(np.arange(n) < 3, 0.5 ** np.arange(n), 0),
    "none": lambda n: np.zeros(n),
}


def products(spectrum, dtype, seed=0):
    """L, R and the singular values of L R, of every shape; two layers each, one twice as large."""
    rng, found = np.random.default_rng(seed), []

    def orthonormal(rows, columns):
        return np.linalg.qr(rng.normal(size=(rows, columns)))[0]

    for d_in, d_out, inner in SHAPES:
        n = min(d_in, d_out, inner)
        values = spectrum(n)
        turn = orthonormal(inner, n)
        left = np.stack([orthonormal(d_in, n) * values @ turn.T for _ in range(2)])
        right = np.stack([turn @ orthonormal(d_out, n).T for _ in range(2)])
        scale = np.array([1.0, 2.0])
        left = left * scale[:, None, None]
        found.append((jnp.asarray(left, dtype), jnp.asarray(right, dtype), scale[:, None] * values))
    return found


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("is_thin", [True, False])
def test_what_is_cut_off_is_what_the_best_cuts_off(name, is_thin):
    dtype = jnp.zeros(()).dtype
    given = products(SPECTRA[name], dtype)
    wanted = [np.asarray(left, float) @ np.asarray(right, float) for left, right, _ in given]
    pairs = [(left, right) for left, right, _ in given]
    if not is_thin:
        pairs = [(jnp.asarray(x, dtype), None) for x in wanted]
    cuts = jax.jit(truncate_all, static_argnums=1)(pairs, RANK)
    eps = float(jnp.finfo(dtype).eps)
    for cut, whole, (_, _, values) in zip(cuts, wanted, given, strict=True):
        basis, right = (np.asarray(x, float) for x in cut[:2])
        assert basis.shape == (2, whole.shape[1], RANK)
        for k in range(2):
            size = max(values[k, 0], 1e-30)
            best = np.sqrt((values[k, RANK:] ** 2).sum())
            lost = np.linalg.norm(whole[k] - basis[k] @ right[k])
            # A tenth off the best, or the rounding of the squares of the largest.
            assert lost <= 1.1 * best + 30 * eps * size, (lost, best)
            np.testing.assert_allclose(np.sqrt(cut.lost2[k]), lost, rtol=1e-3, atol=30 * eps * size)
            gram = basis[k].T @ basis[k]
            kept = np.diagonal(gram) > 0.5
            assert np.abs(gram - np.diag(kept.astype(float))).max() < 1e4 * eps
            np.testing.assert_allclose(right[k], basis[k].T @ whole[k], atol=1e3 * eps * size)


@pytest.mark.parametrize(
    ("spectrum", "rounding"),
    [
        # Directions below the root of the rounding are not found by squares: they are cut off.
        (lambda n: 0.8 ** np.arange(n), 1e3),
        (lambda n: 0.95 ** np.arange(n), 30),
        (lambda n: 0.99 ** np.arange(n) * 1e3 ** -np.digitize(np.arange(n), [10, 40]), 30),
        (lambda n: 0.99 ** np.arange(n) * 1e3 ** -np.digitize(np.arange(n), [10, 64]), 30),
    ],
    ids=["by a fifth", "by a twentieth", "gaps before the rank", "a gap at the rank"],
)
def test_many_columns_in_float32_are_orthonormal_and_keep_what_they_say(spectrum, rounding):
    rank, d = 64, 512
    values, eps = spectrum(d).astype(float), float(jnp.finfo(jnp.float32).eps)
    rng = np.random.default_rng(0)
    ends = [np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2)]
    given = jnp.asarray(ends[0] * values @ ends[1].T, jnp.float32)
    cut = jax.jit(truncate, static_argnames="rank")(given, None, rank=rank)
    whole, basis, right = (np.asarray(x, float) for x in (given, cut.left, cut.right))
    assert np.abs(basis.T @ basis - np.eye(rank)).max() < 1e3 * eps
    best, lost = np.linalg.norm(values[rank:]), np.linalg.norm(whole - basis @ right)
    assert lost <= 1.1 * best + rounding * eps * values[0], (lost, best)
    np.testing.assert_allclose(float(cut.lost2) ** 0.5, lost, rtol=0.02)
    # What is kept and what is cut off are at right angles, as batch_unlearn reckons.
    norm2 = float(cut.lost2) + np.sum(right**2)
    np.testing.assert_allclose(norm2, np.sum(whole**2), rtol=1e-6)


@pytest.mark.parametrize("size", [1e12, 1e-12, 1e18, 1e-18])
def test_a_large_or_small_edit_is_cut_as_one_of_size_one(size, tolerance):
    """In float32, where the squares of squares of 1e12 and of 1e-12 are no numbers."""
    left, right, _ = products(SPECTRA["by a fifth"], jnp.float32)[0]
    scale = jnp.float32(2.0 ** np.round(np.log2(size)))
    # The size stands in one factor, in the matrix, or half in one and half in the other, so that
    # the largest columns of L meet the least rows of R.
    is_odd = jnp.arange(left.shape[-1]) % 2 == 1
    odd, even = jnp.where(is_odd, scale, 1), jnp.where(is_odd, 1, scale)
    pairs = [(left, right), (left @ right, None), (left, right)]
    given = [
        (left * scale, right),
        (left @ right * scale, None),
        (left * odd[None, None], right * even[None, :, None]),
    ]
    cut, wanted = (jax.jit(truncate_all, static_argnums=1)(x, RANK) for x in (given, pairs))
    for one, other in zip(cut, wanted, strict=True):
        assert jnp.all(other.lost2 > 0)
        whole = one.left @ one.right / scale
        tolerance.check(whole, other.left @ other.right, kind="factorization")
        tolerance.check(jnp.sqrt(one.lost2) / scale, jnp.sqrt(other.lost2), kind="factorization")


def test_the_error_of_layers_is_told_where_their_squares_are_no_numbers():
    left, right, _ = products(SPECTRA["by a fifth"], jnp.float32)[0]
    weight = Weight("w", (2, *SHAPES[0][:2]), (), 2, True, *SHAPES[0][:2])
    errors = []
    for size in (1.0, 2.0**84, 2.0**-84):
        edit = Edit({"w": LowRank(left * jnp.float32(size), right, weight)})
        cut, found = compress(edit, RANK)
        assert jnp.max(jnp.abs(cut.blocks["w"].right)) > 0.1 * size
        errors.append(found["w"])
    assert errors[0] > 0
    np.testing.assert_allclose(errors[1:], [errors[0]] * 2, rtol=1e-6)


def test_together_and_alone_and_under_vmap_are_one_thing(tolerance):
    given = [x[:2] for x in products(SPECTRA["by a fifth"], jnp.zeros(()).dtype)[::3]]
    alone = functools.partial(jax.jit(truncate, static_argnames="rank"), rank=RANK)
    together = jax.jit(truncate_all, static_argnums=1)(given, RANK)
    for (left, right), cut in zip(given, together, strict=True):
        for other in (alone(left, right), jax.jit(jax.vmap(alone))(left, right)):
            tolerance.check(cut.left @ cut.right, other.left @ other.right, kind="factorization")
            tolerance.check(cut.lost2, other.lost2, kind="factorization")


def test_an_edit_of_bfloat16_is_cut_in_float32_and_given_back_as_it_came():
    (left, right, values), *_ = products(SPECTRA["by a fifth"], jnp.bfloat16)
    d_in, d_out, _ = SHAPES[0]
    weight = Weight("w", (d_in, d_out), (), 1, False, d_in, d_out)
    edit = Edit({"w": LowRank(left[:1], right[:1], weight), "b": jnp.ones(3, jnp.bfloat16)})
    cut, errors = compress(edit, RANK)
    assert cut.blocks["w"].dtype == jnp.bfloat16
    assert cut.blocks["b"] is edit.blocks["b"]
    best = np.sqrt((values[0, RANK:] ** 2).sum() / (values[0] ** 2).sum())
    np.testing.assert_allclose(errors["w"], best, rtol=0.02)
    whole, kept = (np.asarray(dense(x.blocks["w"]), float) for x in (edit, cut))
    assert np.linalg.norm(whole - kept) / np.linalg.norm(whole) < best + 0.02


def test_blocks_of_different_devices_are_each_cut_where_they_lie():
    """As one asks who has put a model's layers on two devices, or one block on a mesh."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.edits.test_compress"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def on_two_devices():
    """Cut an edit of three blocks that lie on one device, on the other, and on both."""
    one, two = jax.devices()
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=(one, two))
    places = [one, two, NamedSharding(mesh, PartitionSpec(None, "model"))]
    x = jax.random.normal(jax.random.key(0), (30, 30))
    blocks = {str(i): jax.device_put(x, place) for i, place in enumerate(places)}
    cut, errors = compress(Edit(blocks), RANK)
    alone, wanted = compress(Edit({"0": x}), RANK)
    assert list(errors) == list(blocks)
    for path, block in cut.blocks.items():
        assert block.left.devices() == blocks[path].devices()
        np.testing.assert_allclose(errors[path], wanted["0"], rtol=1e-4)
        np.testing.assert_allclose(dense(block), dense(alone.blocks["0"]), atol=1e-4)


if __name__ == "__main__":
    on_two_devices()
