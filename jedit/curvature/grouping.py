"""From sites to blocks: which sites share a parameter, an input moment, an orientation.

A parameter that is used at several sites has one block. Its sites either all lay the leaf out in the
same matrix, or some in the transposed one (a tied embedding and its head), or each reads a slice of
its own (layers stacked in one leaf), which then has its own block.
"""

import dataclasses
import functools

import jax
import numpy as np

from jedit.capture import Site, Sites, Weight
from jedit.capture.provenance import apply_ops


@dataclasses.dataclass(frozen=True)
class Member:
    """One site of a block; static, holds nothing that depends on a batch.

    Attributes:
        site: its name.
        kind: its kind.
        group: sites of equal group read the same canonical input.
        is_flipped: whether its matrix is the transpose of the block's.
        scale: constant factor of the parameter, squared into the moment.
        bias_scale: constant factor of the bias.
        is_matched: whether its positions can be told from padding.
    """

    site: str
    kind: str
    group: int
    is_flipped: bool
    scale: float
    bias_scale: float
    is_matched: bool


@dataclasses.dataclass(frozen=True)
class Block:
    """A block's parameters and sites."""

    name: str
    weight: Weight
    members: tuple[Member, ...]

    @property
    def is_diagonal(self) -> bool:
        """Whether it is a vector parameter, whose block is diagonal."""
        return self.members[0].kind in ("scale", "bias")


def group_sites(sites: Sites, matched: dict[str, bool]) -> tuple[Block, ...]:
    """The blocks of all sites.

    Raises:
        ValueError: sites of one parameter overlap in different layouts.
    """
    groups: dict[tuple, int] = {}
    blocks: dict[str, Block] = {}
    for name, site in sites.items():
        group = -1 if site.record is None else groups.setdefault(site.shared_input, len(groups))
        home, is_flipped = _home(site, blocks)
        member = Member(
            name, site.kind, group, is_flipped, site.scale, site.bias_scale, matched[name]
        )
        if home is None:
            blocks[name] = Block(name, site.weight, (member,))
        else:
            block = blocks[home]
            blocks[home] = dataclasses.replace(block, members=(*block.members, member))
    return tuple(blocks.values())


def _home(site: Site, blocks: dict[str, Block]) -> tuple[str | None, bool]:
    """The block that a site belongs to, and whether flipped; None for a block of its own."""
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
def _relation(first: Weight, second: Weight) -> str:
    if first == second:
        return "equal"
    x, y = _indices(first), _indices(second)
    if x.shape == y.shape and np.array_equal(x, y) and first.paths == second.paths:
        return "equal"
    if first.bias_path is None and second.bias_path is None:
        flipped = np.swapaxes(y, 1, 2)
        if x.shape == flipped.shape and np.array_equal(x, flipped):
            return "transposed"
    return "overlapping" if np.intersect1d(x, y).size else "disjoint"


def _indices(weight: Weight) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        leaf = np.arange(np.prod(weight.shape, dtype=int), dtype=np.int32).reshape(weight.shape)
        matrix = np.asarray(apply_ops(weight.ops, jax.numpy.asarray(leaf)))
    return matrix.reshape(weight.layers, weight.d_in, weight.d_out)
