"""How long an axis may be whose eigenvectors are all asked for: what the libraries can do.

A decomposition that is too long for its library fails when all batches have been summed, hours
after it was asked for, in words that name no parameter; so it is refused when the shapes are known.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh
from jaxtyping import PyTree

from jedit.curvature.subspace import is_iterated, num_columns
from jedit.curvature.types import Curvature, Factor, Kronecker


class Limit(NamedTuple):
    """The most columns of a matrix that a library decomposes, and what it is called."""

    columns: int
    library: str


# jaxlib hands LAPACK's ?syevd a workspace of 1 + 6n + 2n² numbers, counted in 32 bits, and raises
# OverflowError beyond (jax-ml/jax#20904): 32,766 is the last n at which it is below 2³¹.
LAPACK = Limit(32766, "LAPACK with 32-bit integers, as jaxlib has it,")
# jaxlib asks cusolverDnXsyevd for the size of its workspace, which it could not tell beyond some
# 25,000 columns (NVIDIA/CUDALibrarySamples#246, confirmed as a limit of the routine): three n²
# numbers, counted in 32 bits. CUDA 13.0's release notes have it lifted (JuliaGPU/CUDA.jl#3084).
CUSOLVER = Limit(25000, "cuSOLVER before CUDA 13")


def eigh_limit(device: Any) -> Limit | None:
    """Return the limit of a device's library; None: none is known."""
    if device.platform == "cpu":
        return LAPACK
    # Such as "cuda 12090"; TPUs and ROCm say something else.
    version = re.search(r"cuda (\d+)", str(getattr(device.client, "platform_version", "")))
    return CUSOLVER if version and int(version[1]) < 13000 else None


def limit_of(params: PyTree) -> Limit | None:
    """Return the limit where parameters lie, or shapes that have a place; else the default's."""
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        if sharding is not None and not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
            return eigh_limit(min(sharding.device_set, key=lambda device: device.id))
    return eigh_limit(jax.devices()[0])


def is_decomposed_whole(factor: Factor, *, streamed: bool = False) -> bool:
    """Say whether all eigenvectors of a factor are found, whatever is kept of them.

    Args:
        factor: the factor, or its shapes.
        streamed: leading eigenvectors are those of sketches, whose m x m alone is decomposed, where
            a sketch is smaller than the matrix.
    """
    if factor.form != "leading":
        return factor.form == "eigenbasis"
    assert factor.basis is not None
    is_short = is_iterated(factor.basis.shape[-1], factor.dimension)
    return not is_short and not is_of_sketch(factor, streamed=streamed)


def is_of_sketch(factor: Factor, *, streamed: bool) -> bool:
    """Say whether leading eigenvectors are those of a sketch, which is smaller than the moment.

    The moment is shorter by one where the factor has a bias, which nothing here tells of: a sketch
    of one column less than the factor's is taken for none.
    """
    if factor.form != "leading" or not streamed:
        return False
    assert factor.basis is not None
    return num_columns(factor.basis.shape[-1]) < factor.dimension - 1


def too_long(
    curvature: Curvature, limit: Limit, *, streamed: bool = False
) -> Mapping[str, tuple[str, int]]:
    """Return the factors of which more eigenvectors are asked for than a library can find.

    By the factor's name there are the first block that has it, and its side.
    """
    found: dict[str, tuple[str, int]] = {}
    for name, block in curvature.blocks.items():
        for factor in (block.input, block.output) if isinstance(block, Kronecker) else ():
            one = curvature.factors[factor]
            is_whole = is_decomposed_whole(one, streamed=streamed)
            if is_whole and one.dimension > limit.columns:
                found.setdefault(factor, (name, one.dimension))
    return found


def check_decomposable(curvature: Curvature, limit: Limit, *, streamed: bool = False) -> None:
    """Refuse factors that are too long for the eigendecomposition that they are to have.

    Args:
        curvature: the curvature, or one of its shapes.
        limit: what the library can do.
        streamed: whether leading eigenvectors are those of sketches.

    Raises:
        ValueError: the first such block, by its name, with what to do instead.
    """
    if not (found := too_long(curvature, limit, streamed=streamed)):
        return
    factor, (name, side) = next(iter(found.items()))
    others = f" (and {len(found) - 1} more factors)" if len(found) > 1 else ""
    raise ValueError(
        f"the curvature of {name!r} has a factor of {side:,} columns ({factor}){others}, and "
        f"{limit.library} finds the eigenvectors of {limit.columns:,} at most: estimate it by "
        'factorize="cholesky" or "auto", by a rank below a quarter of that, or with a diagonal '
        f"factor there, Factorize(max_dim={limit.columns})"
    )
