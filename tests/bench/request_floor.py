"""How many flops a request's edit takes at the least, by factored damping. Imports no JAX.

With p positions, matrices d_in x d_out, and k columns of an edit, the smaller of p and the rank:

    4 p d_in d_out              through the matrix and back
    2 p (d_in² + d_out²)        (A + λ_A)⁻¹ a and (G + λ_G)⁻¹ g
    2 k (d_in² + d_out²)        the edit's KL: A and G times its two thin matrices

summed over the matrices. What the model has besides (attention, head, norms), the truncation to a
rank, and all sums of squares are not counted.
"""

from collections.abc import Iterable


def request_floor(
    matrices: Iterable[tuple[int, int]], positions: int, rank: int | None = None
) -> int:
    """Return the flops of one request.

    Args:
        matrices: (d_in, d_out) of every matrix that is edited.
        positions: of the request, all of its rows together.
        rank: of the edit; None for no limit.

    Returns:
        The flops.
    """
    columns = positions if rank is None else min(rank, positions)
    through = there_and_back = 0
    for d_in, d_out in matrices:
        through += 4 * positions * d_in * d_out
        there_and_back += 2 * (positions + columns) * (d_in**2 + d_out**2)
    return through + there_and_back
