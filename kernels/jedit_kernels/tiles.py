"""Which tiles of an output a kernel computes, and in what order."""

import math

MULTIPROCESSORS = 132  # of an H100 or H200 in its SXM form
WIDTHS = (256, 192, 128)  # the widest first: it reads least for each product
BAND = 8  # rows of tiles that run at one time, so that they find each other's operands in L2


def all_tiles(rows: int, columns: int, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """(row, column) of every tile of a matrix, the last of each partly outside; band by band."""
    height, width = math.ceil(rows / shape[0]), math.ceil(columns / shape[1])
    return [
        (i, j)
        for first in range(0, height, BAND)
        for j in range(width)
        for i in range(first, min(first + BAND, height))
    ]


def lower_tiles(size: int, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """The tiles of a square matrix that hold something on or below its diagonal."""
    lowest = ((i, j, (i + 1) * shape[0] - 1) for i, j in all_tiles(size, size, shape))
    return [(i, j) for i, j, row in lowest if min(row, size - 1) >= j * shape[1]]


def best_width(count_tiles, layers: int) -> int:
    """The width whose tiles take the fewest rounds over the multiprocessors, by their area.

    Args:
        count_tiles: width -> how many tiles a layer has.
        layers: how many layers one call computes.

    Returns:
        One of `WIDTHS`; of equals the widest.
    """
    return min(WIDTHS, key=lambda w: math.ceil(count_tiles(w) * layers / MULTIPROCESSORS) * w)
