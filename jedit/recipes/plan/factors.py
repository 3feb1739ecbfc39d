"""What the factors of a curvature take, by their size: how each is kept, why, bytes and flops.

    all eigenvectors       9 to 10 times 2 d³ flops (LAPACK, two CPU cores; tests/bench/README.md)
    k leading ones         8 steps of 2 d² m + 4 d m², m = 2k + 8; where 2m >= d, as all of them
    k from a sketch        10 d m² and two decompositions of m x m
    none, by Cholesky      d³ / 3 at each damping, before what solves
    none, by an inverse    12 steps of two products, 4 d³ each, at each damping

The steps of the last two are assumptions: a model's spectra need three to eight steps of orthogonal
iteration, and Newton-Schulz gains a factor of four a step on a condition of some millions.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from jedit.core.devices import sharding_of
from jedit.curvature import Curvature, Factorize
from jedit.curvature.layout import BlockSites
from jedit.curvature.limits import CUSOLVER, LAPACK, Limit, is_decomposed_whole, is_of_sketch
from jedit.curvature.memory import device_bytes
from jedit.curvature.subspace import num_columns
from jedit.curvature.types import Factor, Kronecker

OVER_FLOOR_EIGH = 10.0  # a decomposition's seconds over those of 2 d³ flops; tests/bench/README.md
ITERATIONS = 8  # of orthogonal iteration
INVERSE_STEPS = 12  # of Newton-Schulz, refinements included


class Kept(NamedTuple):
    """Factors of one size that are kept in one way.

    Attributes:
        side: d, the columns of their matrices.
        number: how many matrices, every layer counted.
        form: how they are kept, in a few words.
        why: why so.
        bytes: bytes of all of them on a device.
        flops: of all their decompositions together; by "cholesky" and "inverse" at each damping.
        is_solved: whether they are inverted at a damping, by the edit, and not decomposed.
        is_lookup: whether they are of what embeddings look up, diagonal however short.
        limit: the library that cannot decompose them; None: none is known that cannot.
    """

    side: int
    number: int
    form: str
    why: str
    bytes: int
    flops: float
    is_solved: bool
    is_lookup: bool
    limit: Limit | None


def kept_factors(
    curvature: Curvature, how: Factorize, backend: str, lookups: frozenset[str] = frozenset()
) -> tuple[Kept, ...]:
    """Return the factors of a curvature, or of one of shapes, by size and form, largest first.

    Args:
        curvature: the curvature.
        how: what was asked for.
        backend: on what it is made: "cpu", or an accelerator's name.
        lookups: names of the factors of what embeddings look up, as `lookups_of` finds them.
    """
    groups: dict[tuple[int, str, bool], list[Factor]] = {}
    streamed = how.streamed
    for name, factor in curvature.factors.items():
        key = (factor.dimension, form_of(factor), name in lookups)
        groups.setdefault(key, []).append(factor)
    found = []
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], *item[0][1:]))
    for (side, form, is_lookup), same in ordered:
        one = same[0]
        limits = [LAPACK, CUSOLVER] if backend == "cpu" else [CUSOLVER]
        is_whole = is_decomposed_whole(one, streamed=streamed)
        found.append(
            Kept(
                side=side,
                number=sum(_layers(factor) for factor in same),
                form=form,
                why="an embedding's" if is_lookup else _why(one, how),
                bytes=sum(map(bytes_of, same)),
                flops=sum(_layers(x) * flops_of_one(x, streamed=streamed) for x in same),
                is_solved=one.form == "undecomposed",
                is_lookup=is_lookup,
                limit=next((x for x in limits if is_whole and side > x.columns), None),
            )
        )
    return tuple(found)


def lookups_of(blocks: Iterable[BlockSites], curvature: Curvature) -> frozenset[str]:
    """Return the names of the factors of what embeddings look up."""
    found = set()
    for sites in blocks:
        block = curvature.blocks[sites.name]
        for member in sites.members:
            if member.kind == "embedding" and isinstance(block, Kronecker):
                found.add(block.output if member.is_flipped else block.input)
    return frozenset(found)


def fetched_bytes(curvature: Curvature) -> int:
    """Return the bytes on a device of the factors of one block, the largest, as they are kept."""
    pairs = ((b.input, b.output) for b in curvature.blocks.values() if isinstance(b, Kronecker))
    return max((sum(bytes_of(curvature.factors[end]) for end in pair) for pair in pairs), default=0)


def form_of(factor: Factor) -> str:
    """Return in a few words how a factor is kept."""
    if factor.form == "leading":
        assert factor.basis is not None
        return f"{factor.basis.shape[-1]} eigenvectors"
    names = {"eigenbasis": "eigh", "undecomposed": factor.by}
    return names.get(factor.form, factor.form)


def flops_of_one(factor: Factor, *, streamed: bool = False) -> float:
    """Return the flops of the decomposition of one layer's matrix, or of its sketch."""
    d = float(factor.dimension)
    whole = OVER_FLOOR_EIGH * 2 * d**3
    if factor.form == "leading":
        assert factor.basis is not None
        m = num_columns(factor.basis.shape[-1])
        if is_of_sketch(factor, streamed=streamed):
            return 10 * d * m**2 + 2 * OVER_FLOOR_EIGH * 2 * float(m) ** 3
        step = 2 * d**2 * m + 4 * d * m**2
        return whole if is_decomposed_whole(factor) else ITERATIONS * step
    if factor.form == "undecomposed":
        return 4 * INVERSE_STEPS * d**3 if factor.by == "inverse" else d**3 / 3
    return whole if factor.form == "eigenbasis" else 0.0


def workspace(factors: Sequence[Factor], *, streamed: bool = False) -> int:
    """Return the bytes beside sums and factors in which the largest one is decomposed.

    Four matrices where all eigenvectors are found, whatever is kept of them, and three of the
    iterated columns, or of a sketch's, where some are.
    """
    needed = [0]
    for factor in factors:
        if factor.basis is None:
            continue
        d, k = factor.basis.shape[1:]
        if is_decomposed_whole(factor, streamed=streamed):
            needed.append(4 * d**2 * factor.basis.dtype.itemsize)
        elif factor.form == "leading":
            needed.append(3 * d * min(num_columns(k), d) * factor.basis.dtype.itemsize)
    return max(needed)


def dropped(factors: Sequence[Factor], num_devices: int, *, streamed: bool = False) -> int:
    """Return the bytes on a device of the moments whose leading eigenvectors alone are kept.

    Of a sketched one they are those of its image and of the columns that this is an image of.
    """
    total = 0
    for factor in factors:
        if factor.form == "leading":
            assert factor.basis is not None
            columns = factor.dimension
            if is_of_sketch(factor, streamed=streamed):
                columns = 2 * num_columns(factor.basis.shape[-1])
            total += _layers(factor) * factor.dimension * columns * factor.basis.dtype.itemsize
    return total // num_devices


def bytes_of(tree: Any) -> int:
    """Return the bytes of all arrays, or shapes, on one of the devices that share them."""
    places = jax.tree.map(lambda x: x.sharding, tree)
    if all(sharding_of(x) is None for x in jax.tree.leaves(tree)):
        places = None
    return sum(jax.tree.leaves(device_bytes(tree, places)))


def _why(factor: Factor, how: Factorize) -> str:
    if factor.form == "diagonal":
        return f"longer than max_dim={how.max_dim}"
    if how.by != "auto":
        is_short = how.rank is not None and factor.form == "eigenbasis"
        return "no longer than the rank" if is_short else "as asked for"
    if factor.dimension > how.eigh_dim:
        return f"auto: longer than {how.eigh_dim}"
    if factor.form == "undecomposed":
        return "auto: damped with a longer one"
    return f"auto: at most {how.eigh_dim}"


def _layers(factor: Factor) -> int:
    return jax.tree.leaves(factor)[0].shape[0]
