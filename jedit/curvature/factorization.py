"""How a Kronecker curvature's factors are kept: which are dense, and how those are taken apart."""

import dataclasses

from jedit.core.arguments import check_word
from jedit.core.checks import COUNT, check_numbers
from jedit.curvature.types import By


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
    """

    by: By = "eigh"
    rank: int | None = None
    max_dim: int = 16384

    def __post_init__(self) -> None:
        """Refuse words and numbers that are none.

        Raises:
            ValueError: another word, a number out of its range, or a rank beside another `by`.
        """
        check_word(By, by=self.by)
        check_numbers(COUNT, rank=self.rank, max_dim=self.max_dim)
        if self.rank is not None and self.by != "eigh":
            raise ValueError(
                f'rank={self.rank} keeps eigenvectors, which by="{self.by}" does without: give one '
                "of the two"
            )


def factorizing(how: Factorize | By) -> Factorize:
    """Return the settings that a word stands for.

    Raises:
        ValueError: another word.
    """
    return how if isinstance(how, Factorize) else Factorize(by=how)
