"""Where leading eigenvectors begin: at those of an earlier curvature, found by the block's name.

Not by the factor's, which tells of the first site that reads an input, and of scales: another
selection of parameters has other first sites.
"""

from collections.abc import Iterable, Mapping

from jaxtyping import Array

from jedit.core.devices import fetched
from jedit.curvature.layout import BlockSites, is_same_matrix
from jedit.curvature.types import Curvature, Diagonal, Kronecker
from jedit.tracing.sites import Weight


def check_start(blocks: Iterable[BlockSites], earlier: Curvature) -> None:
    """Refuse a start whose block is of another matrix than the one of its name to be estimated.

    Raises:
        ValueError: it is of another slice or layout of the parameter, or with a bias where this one
            is without.
    """
    for block in blocks:
        known = earlier.blocks.get(block.name)
        if isinstance(known, Kronecker) and not is_same_matrix(known.weight, block.weight):
            raise ValueError(
                f"the start's block of {block.name!r} is of other entries of the parameters, "
                f"{_told(known.weight)}, than this estimate's, {_told(block.weight)}: start from a "
                "curvature of the same apply and the same choice of biases, or from none"
            )


def _told(weight: Weight) -> str:
    layers = f"{weight.layers} matrices of " if weight.is_stacked else ""
    bias = "no bias" if weight.bias_path is None else f"the bias {weight.bias_path!r}"
    return f"{layers}{weight.d_in} x {weight.d_out} with {bias}"


def by_factor(
    blocks: Mapping[str, Kronecker | Diagonal], earlier: Curvature | None
) -> dict[str, Array]:
    """Return an earlier curvature's eigenvectors by the names of the factors that start from them.

    A factor of which no block was there, or had eigenvectors, has none.
    """
    found: dict[str, Array] = {}
    for name, block in blocks.items():
        known = None if earlier is None else earlier.blocks.get(name)
        if not isinstance(block, Kronecker) or not isinstance(known, Kronecker):
            continue
        for new, old in ((block.input, known.input), (block.output, known.output)):
            assert earlier is not None  # it has the block
            if (basis := earlier.factors[old].basis) is not None:
                found.setdefault(new, basis)
    return found


def by_site(
    blocks: Iterable[BlockSites], earlier: Curvature | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return an earlier curvature's eigenvectors by input group and by site.

    Blocks of several sites have none: what their sites' sums are put together of must be images of
    one Ω, and only the random one is the same for all.
    """
    blocks = [b for b in blocks if not b.is_diagonal]
    if earlier is None:
        return {}, {}
    joined = {m.group for b in blocks if len(b.members) > 1 for m in b.members}
    inputs, outputs = {}, {}
    for block in blocks:
        member, *others = block.members
        known = earlier.blocks.get(block.name)
        if others or not isinstance(known, Kronecker):
            continue
        a, g = (earlier.factors[name].basis for name in (known.input, known.output))
        if a is not None and block.weight.bias_path is not None:
            a = a[:, :-1]
        a, g = (g, a) if member.is_flipped else (a, g)
        if a is not None and member.group not in joined:
            inputs.setdefault(member.group, fetched(a))
        if g is not None:
            outputs[member.site] = fetched(g)
    return inputs, outputs
