"""Sites in the making: where they stand, and how a bias comes to belong to one of them."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from jedit.tracing.provenance import Provenance, axis_groups
from jedit.tracing.sites import Site
from jedit.tracing.source import source_line


@dataclasses.dataclass(frozen=True)
class Scope:
    """The place of an equation: the scans and the `cond` branch around it, and the call's line.

    Attributes:
        lengths: the lengths of the scans around, outermost first.
        key: a value that tells the jaxprs apart in which equal numbers are equal arrays.
        branch: index of the branch around, or None.
        num_outer: how many of the scans are around that branch.
        source: the user's line that calls the jaxpr in which the equation stands.
    """

    lengths: tuple[int, ...] = ()
    key: Any = ()
    branch: int | None = None
    num_outer: int = 0
    source: str = ""

    def scan(self, length: int, key: Any) -> "Scope":
        """Return the scope inside a scan's body."""
        return dataclasses.replace(self, lengths=(*self.lengths, length), key=key)

    def branched(self, key: Any, branch: int) -> "Scope":
        """Return the scope inside a branch of a `cond`."""
        return dataclasses.replace(self, key=key, branch=branch, num_outer=len(self.lengths))

    def within(self, layers: Sequence[tuple[int, int, int]]) -> "Scope":
        """Return the scope cut to these iterations, (depth, start, stop), of the scans around."""
        lengths = list(self.lengths)
        for depth, start, stop in layers:
            lengths[depth] = stop - start
        return dataclasses.replace(self, lengths=tuple(lengths))

    def called_from(self, eqn) -> "Scope":
        """Return the scope inside a call, whose equations without a line of their own take its."""
        return dataclasses.replace(self, source=source_line(eqn, self.source))


@dataclasses.dataclass(eq=False)
class Draft:
    """A site in the making, whose bias and coverage are not settled yet.

    Attributes:
        site: the site so far.
        reads: index of the operand that is its activation, None where there is none.
        view: how its output was relaid since, while it may still meet its bias.
        offer: for a bias, how it would stand in the site to whose output it is added.
    """

    site: Site
    reads: int | None
    view: "View | None" = None
    offer: "Offer | None" = None


@dataclasses.dataclass(frozen=True, eq=False)
class Offer:
    """The offer of a bias to become the last row of the matrix of the site `host`."""

    host: Draft
    path: str
    shape: tuple[int, ...]
    ops: tuple
    scale: float

    @property
    def row(self) -> tuple:
        """Return a value equal for two offers that would make the same matrix of one host."""
        return (self.path, self.ops, self.scale)

    def to_site(self) -> Site:
        """Return the host's site with the bias as the last row of its matrix."""
        site = self.host.site
        weight = dataclasses.replace(
            site.weight, bias_path=self.path, bias_shape=self.shape, bias_ops=self.ops
        )
        return dataclasses.replace(site, weight=weight, bias_scale=self.scale)


@dataclasses.dataclass(frozen=True)
class View:
    """A site's output after relayouts: each axis's stride among the features, None for positions.

    The stride is counted in the weight's own order of features (batch dimensions, then the rest);
    a bias is in that order exactly when the strides are those of a row-major array.
    """

    draft: Draft
    strides: tuple[int | None, ...]
    shape: tuple[int, ...]

    @classmethod
    def of_output(cls, draft: Draft, shape: tuple[int, ...], features: Sequence[int]) -> "View":
        """Return a site's output, of which the axes `features` are the weight's, in its order."""
        strides: list[int | None] = [None] * len(shape)
        for k, i in enumerate(features):
            strides[i] = math.prod(shape[f] for f in features[k + 1 :])
        return cls(draft, tuple(strides), shape)

    def after(self, name: str, eqn) -> "View | None":
        """Return the view after a relayout; None where features and positions would be mixed."""
        shape = eqn.outvars[0].aval.shape
        if name == "transpose":
            strides = tuple(self.strides[i] for i in eqn.params["permutation"])
        elif name in ("reshape", "squeeze", "expand_dims"):
            is_plain = name != "reshape" or eqn.params["dimensions"] is None
            strides = _regroup(self.strides, self.shape, shape) if is_plain else None
        elif name in ("convert_element_type", "reduce_precision"):
            strides = self.strides
        else:
            strides = None
        return None if strides is None else View(self.draft, strides, shape)

    def accepts(self, bias: Provenance) -> bool:
        """Say whether the bias varies along exactly the feature axes, in the weight's own order."""
        if bias.shape != self.shape:
            return False
        expected = 1
        for n, stride, core in reversed(
            list(zip(self.shape, self.strides, bias.view, strict=True))
        ):
            if n == 1:  # an axis of one entry has no stride to speak of
                continue
            if (stride is None) != (core is None) or stride not in (None, expected):
                return False
            expected *= 1 if stride is None else n
        return True


def _regroup(strides, old, new) -> tuple | None:
    """Return the strides after a reshape.

    They are None where features meet positions, or features out of order.
    """
    out: list[int | None] = []
    for before, after in axis_groups(old, new):
        axes = [i for i in before if old[i] != 1]
        # Axes merge only where they lie row-major, each stride the next one's times its length.
        if all(strides[i] is None for i in axes):
            out += [None] * len(after)
            continue
        if any(strides[i] is None for i in axes):
            return None
        if any(strides[i] != strides[j] * old[j] for i, j in itertools.pairwise(axes)):
            return None
        last = strides[axes[-1]]
        out += [last * math.prod(new[k] for k in after if k > j) for j in after]
    return tuple(out)
