"""The shared kernel and its tiles."""

import jax.numpy as jnp
import numpy as np
import pytest
from jedit_kernels.tiles import WIDTHS, all_tiles, best_width, lower_tiles

from tests.kernels.hopper import check, draw, interpreted, needs_kernels

SIZES = [(256, 256), (200, 330), (1000, 1100), (1, 1), (128, 129)]


def covered(tiles, rows, columns, shape):
    """How often each entry of a matrix is in a tile."""
    count = np.zeros((rows, columns), int)
    for i, j in tiles:
        count[i * shape[0] : (i + 1) * shape[0], j * shape[1] : (j + 1) * shape[1]] += 1
    return count


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", SIZES)
def test_tiles_cover_everything_once(size, width):
    shape = (128, width)
    assert (covered(all_tiles(*size, shape), *size, shape) == 1).all()
    count = covered(lower_tiles(size[1], shape), size[1], size[1], shape)
    assert (np.tril(count) == np.tril(np.ones_like(count))).all()
    # Nothing is computed but tiles that reach the diagonal.
    assert all(min((i + 1) * 128, size[1]) > j * width for i, j in lower_tiles(size[1], shape))


@pytest.mark.parametrize("d", [4096, 14336])
def test_lower_tiles_are_little_more_than_half(d):
    for width in WIDTHS:
        tiles = lower_tiles(d, (128, width))
        assert len(tiles) * 128 * width < (0.5 + 0.6 * width / d + 0.01) * d**2


def test_the_width_of_the_least_expected_time_is_taken():
    # One round more costs more than the narrower tiles save, and the other way round.
    assert best_width({256: 67, 192: 90, 128: 132}.__getitem__, 1) == 128
    assert best_width({256: 66, 192: 88, 128: 132}.__getitem__, 1) == 256


@needs_kernels
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(key, width):
    from jedit_kernels.contraction import TILE_HEIGHT, contract

    layers, k, m, n = 2, 70, 300, 200
    a, b, addend = draw(key, (layers, 1, k, m), (layers, 1, k, n), (layers, m, n))
    with interpreted(is_whole=False):
        out = contract(
            jnp.asarray(a),
            jnp.asarray(b),
            jnp.asarray(addend, jnp.float32),
            tiles=all_tiles(m, n, (TILE_HEIGHT, width)),
            width=width,
        )
    a, b, addend = (x.astype(np.float64) for x in (a, b, addend))
    product = np.einsum("lki,lkj->lij", a[:, 0], b[:, 0])
    check(out, addend + product, 1e-6)
