"""How a Kronecker curvature's factors are kept: which are dense, and how those are taken apart.

By "auto" the size of a factor decides:

    d <= eigh_dim                        all eigenvectors
    longer ones, with a rank k           their k leading eigenvectors
    longer ones, without                 the matrix alone ("cholesky"), and so is every factor that
                                         stands in a block with one of these

The two factors of a block are damped apart if one of them has no eigenvectors, so that those of the
other would serve nobody; the leading ones stand well beside all of another axis.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from jedit.core.arguments import check_kind, check_word
from jedit.core.checks import COUNT, check_numbers
from jedit.curvature.types import By, Curvature

# What can be asked for: one way for all dense factors, or another for long ones.
Choice = Literal[By, "auto"]


@dataclasses.dataclass(frozen=True)
class Factorize:
    """Settings by which the factors A and G of every matrix are kept.

    Attributes:
        by: "eigh", all eigenvectors, with which every function of the curvature is exact;
            "cholesky", the matrices alone: a damped solve factorises them at its damping, which is
            then put on A and G apart; "inverse", the same by products of matrices alone; or "auto",
            all eigenvectors of short axes, and of longer ones none, or `rank` of them.
        rank: k, the leading eigenvectors that are kept of a dense factor, the rest by the mean of
            its eigenvalues; None: as `by` says. It stands with "eigh", or of long axes with "auto".
        max_dim: longest axis that gets a dense factor; longer ones (vocabularies) a diagonal one.
            Arbitrary: a factor of this size takes 1 GiB.
        streamed: with a rank: the moments are never formed, but summed as sketches of d x (2k + 8)
            numbers where those are fewer than d x d; the eigenvectors are then those of one pass,
            Nyström's, which a second estimate refines when it starts from the first. False: the
            moments are summed, and their eigenvectors iterated until they stand still.
        start: with a rank: an earlier curvature of the same parameters, from whose eigenvectors the
            iteration starts, or the sketch, block by block; None, and for blocks that it is
            without: from random columns of a fixed key.
        eigh_dim: of "auto", longest axis of which all eigenvectors are kept. 8192 is arbitrary: a
            decomposition takes a minute there on two CPU cores, and every library's are longer.
    """

    by: Choice = "eigh"
    rank: int | None = None
    max_dim: int = 16384
    streamed: bool = False
    start: Curvature | None = dataclasses.field(default=None, compare=False)
    eigh_dim: int = 8192

    def __post_init__(self) -> None:
        """Refuse words and numbers that are none.

        Raises:
            TypeError: the start is no curvature.
            ValueError: another word, a number out of its range, a rank beside another `by`, or
                what goes with a rank alone without one.
        """
        check_word(Choice, by=self.by)
        check_numbers(COUNT, rank=self.rank, max_dim=self.max_dim, eigh_dim=self.eigh_dim)
        if self.rank is not None and self.by not in ("eigh", "auto"):
            raise ValueError(
                f'rank={self.rank} keeps eigenvectors, which by="{self.by}" does without: give one '
                "of the two"
            )
        if self.rank is None and (self.streamed or self.start is not None):
            raise ValueError(
                "streamed=True and start= are about the leading eigenvectors: give their number, "
                "rank=k"
            )
        if self.start is not None:
            check_kind(self.start, Curvature, "start", "as `estimate` returns it")


def factorizing(how: Factorize | Choice) -> Factorize:
    """Return the settings that a word stands for.

    Raises:
        ValueError: another word.
    """
    return how if isinstance(how, Factorize) else Factorize(by=how)


def choose(
    pairs: Iterable[tuple[str, str]], sides: Mapping[str, int], how: Factorize
) -> dict[str, Factorize]:
    """Return how each factor is kept: `how` itself, or what "auto" comes to.

    Args:
        pairs: names of the factors A and G of every block; blocks may share one.
        sides: d of every factor by name; of a diagonal one, 0.
        how: what is asked for.
    """
    if how.by != "auto":
        return dict.fromkeys(sides, how)
    short = Factorize(max_dim=how.max_dim)
    chosen = {name for name, d in sides.items() if d > how.eigh_dim}
    if how.rank is not None:
        beyond = dataclasses.replace(how, by="eigh")
    else:
        beyond, pairs, number = dataclasses.replace(how, by="cholesky"), list(pairs), -1
        while len(chosen) > number:  # a factor that is shared takes its other blocks with it
            number = len(chosen)
            chosen |= {name for pair in pairs if chosen & set(pair) for name in pair}
    return {name: beyond if name in chosen else short for name in sides}
