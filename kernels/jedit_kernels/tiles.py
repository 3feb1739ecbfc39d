"""Which tiles of an output a kernel computes, and in what order."""

import math
from collections.abc import Callable

CLUSTERS = 66  # pairs of multiprocessors of an H100 or H200 in its SXM form
WIDTHS = (256, 192, 128)
BAND = 4  # rows of tiles that run at one time, so that they find each other's operands in L2


def all_tiles(rows: int, columns: int, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (row, column) of every tile, band by band; the last ones are partly outside."""
    height, width = math.ceil(rows / shape[0]), math.ceil(columns / shape[1])
    return [
        (i, j)
        for first in range(0, height, BAND)
        for j in range(width)
        for i in range(first, min(first + BAND, height))
    ]


def lower_tiles(size: int, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the tiles of a square matrix that hold something on or below its diagonal."""
    lowest = ((i, j, (i + 1) * shape[0] - 1) for i, j in all_tiles(size, size, shape))
    return [(i, j) for i, j, row in lowest if min(row, size - 1) >= j * shape[1]]


def best_width(count_tiles: Callable[[int], int], layers: int) -> int:
    """Return the width that is expected to take the least time; no GPU has been asked yet.

    A round over the multiprocessors is taken to last as long as reading a tile's operands from L2,
    which for tiles of this size is longer than multiplying them: 256 + width columns.

    Args:
        count_tiles: width -> how many tiles a layer has.
        layers: how many layers one call computes.

    Returns:
        One of `WIDTHS`; of equals the widest.
    """
    return min(WIDTHS, key=lambda w: math.ceil(count_tiles(w) * layers / CLUSTERS) * (256 + w))
