"""How a Kronecker curvature's factors are kept: which are dense, and how those are taken apart."""

import dataclasses

from jedit.core.arguments import check_kind, check_word
from jedit.core.checks import COUNT, check_numbers
from jedit.curvature.types import By, Curvature


@dataclasses.dataclass(frozen=True)
class Factorize:
    """Settings by which the factors A and G of every matrix are kept.

    Attributes:
        by: "eigh", all eigenvectors, with which every function of the curvature is exact;
            "cholesky", the matrices alone: a damped solve factorises them at its damping, which is
            then put on A and G apart; or "inverse", the same by products of matrices alone.
        rank: k, the leading eigenvectors that are kept of a dense factor, the rest by the mean of
            its eigenvalues; None: as `by` says. It stands with "eigh" alone.
        max_dim: longest axis that gets a dense factor; longer ones (vocabularies) a diagonal one.
            Arbitrary: a factor of this size takes 1 GiB.
        streamed: with a rank: the moments are never formed, but summed as sketches of d x (2k + 8)
            numbers where those are fewer than d x d; the eigenvectors are then those of one pass,
            Nyström's, which a second estimate refines when it starts from the first. False: the
            moments are summed, and their eigenvectors iterated until they stand still.
        start: with a rank: an earlier curvature of the same parameters, from whose eigenvectors the
            iteration starts, or the sketch; None: from random columns of a fixed key.
    """

    by: By = "eigh"
    rank: int | None = None
    max_dim: int = 16384
    streamed: bool = False
    start: Curvature | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Refuse words and numbers that are none.

        Raises:
            TypeError: the start is no curvature.
            ValueError: another word, a number out of its range, a rank beside another `by`, or
                what goes with a rank alone without one.
        """
        check_word(By, by=self.by)
        check_numbers(COUNT, rank=self.rank, max_dim=self.max_dim)
        if self.rank is not None and self.by != "eigh":
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


def factorizing(how: Factorize | By) -> Factorize:
    """Return the settings that a word stands for.

    Raises:
        ValueError: another word.
    """
    return how if isinstance(how, Factorize) else Factorize(by=how)
