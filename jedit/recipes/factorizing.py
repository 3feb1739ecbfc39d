"""How the factors of curvatures are kept, after what the methods that use them take of these."""

from collections.abc import Sequence

from jedit.curvature import Factorize
from jedit.methods.row import Need, Row, Spectrum

FITTED = frozenset(
    {Need.CURVATURE, Need.CORRECTED, Need.TARGET_MOMENTS, Need.REST_MOMENTS},
)
RANK = 1024  # eigenvectors of a long axis, by "auto", for methods that take leading ones; arbitrary
# What a setting leaves out, for a sentence that names it.
WITHOUT = {
    "cholesky": "keeps the factors' matrices alone",
    "inverse": "keeps the factors' matrices alone",
    "eigh": "keeps the leading eigenvectors alone",
    "auto": "keeps the leading eigenvectors of long axes alone",
}


def spectrum_of(row: Row | None) -> Spectrum | None:
    """Return what a method takes of factors; None: it has none. Natural steps have no row."""
    if row is None:
        return Spectrum.SOLVES
    return row.spectrum if row.needs & FITTED else None


def factorize_for(rows: Sequence[Row | None], how: Factorize) -> Factorize:
    """Return the setting that serves all of the methods: "auto" comes to what they take of factors.

    Long axes then keep no eigenvectors where damped solves or the matrices are all that is taken,
    `RANK` of them where the leading ones will do, and all of them where a method takes all. What it
    returned once it returns again.

    Args:
        rows: the methods; None: natural steps.
        how: what was asked for.

    Raises:
        ValueError: the setting leaves out what a method takes of its factors; the first such
            method, by its name.
    """
    wanted = {spectrum_of(row) for row in rows} - {None}
    if how.by == "auto" and how.rank is None:
        if Spectrum.ALL in wanted or wanted >= {Spectrum.MATRICES, Spectrum.LEADING}:
            how = Factorize(max_dim=how.max_dim)
        elif Spectrum.LEADING in wanted:
            how = Factorize("auto", RANK, how.max_dim, eigh_dim=how.eigh_dim)
    for row in rows:
        spectrum = spectrum_of(row)
        if row is not None and spectrum is not None and not spectrum.allows(how):
            raise ValueError(
                f"{row.name} takes {spectrum.value} of its curvature, and {told(how)} "
                f'{WITHOUT[how.by]}: give "eigh" or "auto" (--factorize) and no rank, or '
                "leave the method out"
            )
    return how


def told(how: Factorize) -> str:
    """Return a setting in a few words: how, and the number of eigenvectors."""
    rank = "" if how.rank is None else f", rank {how.rank}"
    return f"factorize {how.by}{rank}"


def written(how: Factorize) -> dict[str, str | int | None]:
    """Return a setting as results and digests have it."""
    return {name: getattr(how, name) for name in ("by", "rank", "max_dim", "eigh_dim")}
