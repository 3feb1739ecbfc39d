"""Methods that are asked for by name: what cannot be run is refused before any work."""

from collections.abc import Sequence

from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import ByScale, BySteps, Material, Need, Row
from jedit.recipes.comparison.task import Grid


def rows_named(names: Sequence[str]) -> Sequence[Row]:
    """Return the catalogue's rows of these names.

    Raises:
        ValueError: a name that the catalogue does not have.
    """
    if unknown := [name for name in names if name not in CATALOGUE]:
        raise ValueError(f"unknown methods: {', '.join(unknown)}; there are {', '.join(CATALOGUE)}")
    return [CATALOGUE[name] for name in names]


def check_methods(names: Sequence[str], has: frozenset[Need], what: str) -> Sequence[Row]:
    """Return the catalogue's rows of these names, all of which a benchmark can run.

    Args:
        names: names of methods.
        has: what the benchmark can give beside a model, a forget set and a retain set.
        what: the benchmark's name, for the message.

    Raises:
        ValueError: a name that the catalogue does not have, or a method that needs what the
            benchmark has not.
    """
    rows = rows_named(names)
    for row in rows:
        if lacking := [need.value for need in Need if need in row.needs - has]:
            raise ValueError(f"{row.name} needs {', '.join(lacking)}, which {what} has not")
    return rows


def check_grid(grid: Grid, rows: Sequence[Row]) -> None:
    """Refuse a grid that has no rates or scales for one of its methods.

    Raises:
        ValueError: the method, and what it has none of.
    """
    for row in rows:
        if isinstance(row, BySteps) and row.pace not in grid.rates:
            raise ValueError(f"{row.name}: the grid has no rates for {row.pace}")
        if isinstance(row, ByScale) and row.reach not in grid.scales:
            raise ValueError(f"{row.name}: the grid has no scales for {row.reach}")


def check_needs(rows: Sequence[Row], material: Material, *, but: frozenset[Need]) -> None:
    """Refuse methods that need what the material does not hold, but for what comes later.

    Raises:
        ValueError: the first such method, and what it needs.
    """
    for row in rows:
        if lacking := [need.value for need in row.missing(material) if need not in but]:
            raise ValueError(f"{row.name} needs {', '.join(lacking)}, which this task has not")
