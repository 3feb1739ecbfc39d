"""From sites to blocks: which sites share a parameter, an input moment, an orientation.

A parameter that is used at several sites has one block. Its sites either all lay the leaf out in
the same matrix, or some in the transposed one (a tied embedding and its head), or each reads a
slice of its own (layers stacked in one leaf), which then has its own block.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np

from jedit.curvature.positions import Alignment
from jedit.tracing import Site, Sites, Weight


@dataclasses.dataclass(frozen=True)
class Member:
    """One site of a block; static, holds nothing that depends on a batch.

    Attributes:
        site: the site's name.
        kind: the site's kind, such as "dense".
        group: the first site that reads the same canonical input; empty for a bias.
        is_flipped: whether its matrix is the transpose of the block's.
        scale: constant factor of the parameter, squared into the moment.
        bias_scale: constant factor of the bias.
        is_maskable: whether its padding can be told from data.
    """

    site: str
    kind: str
    group: str
    is_flipped: bool
    scale: float
    bias_scale: float
    is_maskable: bool


@dataclasses.dataclass(frozen=True)
class BlockSites:
    """The parameters of a block, as one matrix, and the sites that read it."""

    name: str
    weight: Weight
    members: tuple[Member, ...]

    @property
    def is_diagonal(self) -> bool:
        """Say whether it is a vector parameter, whose block is diagonal."""
        return self.members[0].kind in ("scale", "bias")

    @property
    def hint(self) -> str:
        """Say why its sums may hold no number, if it is known beforehand; else empty."""
        unclear = [m.site for m in self.members if not m.is_maskable]
        return padding_hint(unclear) if unclear else ""


def padding_hint(names: list[str]) -> str:
    """Say of sites that their padding cannot be told from data, and what to do."""
    return (
        f"the positions of {', '.join(names)} cannot be matched with the outputs' leading axes, "
        "and some batch has padding (a zero in `valid`); leave the parameter out by `select`, or "
        "give batches without padding"
    )


def group_sites(sites: Sites, alignments: Mapping[str, Alignment]) -> tuple[BlockSites, ...]:
    """Return the blocks of all sites, in their order.

    Args:
        sites: the captured sites.
        alignments: by site, where the outputs' axes are.

    Returns:
        The blocks, in the order of their first sites.

    Raises:
        ValueError: sites of one parameter overlap in different layouts.
    """
    groups: dict[tuple, str] = {}
    blocks: dict[str, BlockSites] = {}
    for name, site in sites.items():
        group = ""
        if site.record is not None:
            group = groups.setdefault(site.shared_input, name)
        home, is_flipped = _home(site, blocks)
        member = Member(
            name,
            site.kind,
            group,
            is_flipped,
            site.scale,
            site.bias_scale,
            alignments[name].is_maskable,
        )
        if home is None:
            blocks[name] = BlockSites(name, site.weight, (member,))
        else:
            members = (*blocks[home].members, member)
            blocks[home] = dataclasses.replace(blocks[home], members=members)
    return tuple(blocks.values())


def is_same_matrix(first: Weight, second: Weight) -> bool:
    """Say whether two are the same matrix of the same parameters, however that is worded."""
    return first.path == second.path and _relation(first, second) == "equal"


def _home(site: Site, blocks: dict[str, BlockSites]) -> tuple[str | None, bool]:
    """Return the block that a site belongs to, and whether flipped; None for a block of its own.

    Raises:
        ValueError: the site's matrix overlaps the block's, and is neither that one nor its
            transpose.
    """
    for name, block in blocks.items():
        if block.weight.path != site.path:
            continue
        relation = _relation(block.weight, site.weight)
        if relation == "disjoint":
            continue
        is_vector = site.kind in ("scale", "bias")
        if relation == "overlapping" or is_vector != block.is_diagonal:
            raise ValueError(
                f"parameter {site.path!r} is used at {name} and at {site.name} ({site.source}) in "
                "layouts that overlap without being equal or transposed; select other parameters"
            )
        return name, relation == "transposed"
    return None, False


@functools.lru_cache(maxsize=256)
def _relation(
    first: Weight, second: Weight
) -> Literal["equal", "transposed", "disjoint", "overlapping"]:
    """Return how two matrices of one leaf lie to each other."""
    if first == second:
        return "equal"
    if _are_slices_apart(first, second):
        return "disjoint"
    # Relayouts of another wording may do the same: only numbering the leaf's entries can tell.
    x, y = _entries(first), _entries(second)
    if x.shape == y.shape and np.array_equal(x, y) and first.paths == second.paths:
        return "equal"
    if first.bias_path is None and second.bias_path is None:
        flipped = np.swapaxes(y, 1, 2)
        if x.shape == flipped.shape and np.array_equal(x, flipped):
            return "transposed"
    return "overlapping" if np.intersect1d(x, y).size else "disjoint"


def _are_slices_apart(first: Weight, second: Weight) -> bool:
    """Say whether the first relayout that differs slices other parts, as unrolled layers do.

    It is quick where `_entries` is not: there are as many pairs as the square of the layers.
    """
    for one, other in zip(first.ops, second.ops, strict=False):
        if one == other:
            continue
        if (one[0], other[0]) != ("slice", "slice"):
            return False
        (_, start, limit, _), (_, other_start, other_limit, _) = one, other
        ranges = zip(start, limit, other_start, other_limit, strict=True)
        return any(b <= c or d <= a for a, b, c, d in ranges)
    return False


def _entries(weight: Weight) -> np.ndarray:
    """Return which entry of the leaf stands where in the matrix (layers, d_in, d_out)."""
    entries = np.arange(np.prod(weight.shape, dtype=np.int64)).reshape(weight.shape)
    num_layers = 0  # leading axes that a scan slices; what follows acts on the others
    for name, *arguments in weight.ops:
        if name == "layer":
            num_layers += 1
        elif name == "transpose":
            axes = (num_layers + i for i in arguments[0])
            entries = entries.transpose(*range(num_layers), *axes)
        elif name == "reshape":
            entries = entries.reshape(*entries.shape[:num_layers], *arguments[0])
        else:
            index = tuple(map(slice, *arguments))
            entries = entries[(slice(None),) * num_layers + index]
    return entries.reshape(weight.layers, weight.d_in, weight.d_out)
