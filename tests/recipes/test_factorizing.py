"""What "auto" comes to for some methods, and which of them a setting leaves out."""

import dataclasses

import pytest

from jedit.curvature import Factorize
from jedit.methods import CATALOGUE
from jedit.methods.row import Spectrum
from jedit.recipes.factorizing import RANK, factorize_for, told, written

AUTO = Factorize("auto", max_dim=99, eigh_dim=7)
ALL, LEADING = Factorize(max_dim=99), Factorize("auto", RANK, 99, eigh_dim=7)


def row(spectrum):
    return dataclasses.replace(CATALOGUE["K-FADE (K-FAC)"], spectrum=Spectrum[spectrum])


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        (["SOLVES"], AUTO),
        (["MATRICES", "SOLVES"], AUTO),
        (["LEADING", "SOLVES"], LEADING),
        (["LEADING", "MATRICES"], ALL),  # what has the leading ones has no matrices
        (["ALL", "LEADING"], ALL),
        (["SOLVES", "ALL"], ALL),
    ],
)
def test_auto_is_the_cheapest_that_serves_all(taken, expected):
    rows = [*map(row, taken), CATALOGUE["NPO"], None]
    found = factorize_for(rows, AUTO)
    assert found == expected
    assert factorize_for(rows, found) == found


def test_what_was_asked_for_by_name_is_not_changed():
    for how in (Factorize("cholesky"), Factorize(rank=3), Factorize("auto", rank=3), ALL):
        assert factorize_for([row("SOLVES")], how) == how
    # Methods without a curvature, and natural steps, have no say.
    assert factorize_for([CATALOGUE["NPO"], None], AUTO) == AUTO


def test_a_method_that_is_left_out_is_named():
    for how, served in (
        (Factorize("cholesky"), {"SOLVES", "MATRICES"}),
        (Factorize("inverse"), {"SOLVES", "MATRICES"}),
        (Factorize(rank=3), {"SOLVES", "LEADING"}),
        (AUTO, {"SOLVES", "MATRICES", "LEADING", "ALL"}),
        (Factorize("auto", rank=3), {"SOLVES", "LEADING"}),
    ):
        for spectrum in Spectrum:
            rows = [CATALOGUE["NPO"], None, row(spectrum.name)]
            if spectrum.name in served:
                factorize_for(rows, how)
                continue
            with pytest.raises(ValueError, match=r"^K-FADE \(K-FAC\) takes .*, and factorize"):
                factorize_for(rows, how)


def test_auto_alone_has_eigenvectors_of_short_axes_alone():
    """Whatever their size, factors have but what solves and matrices take, until it is resolved."""
    allowed = {spectrum.name for spectrum in Spectrum if spectrum.allows(AUTO)}
    assert allowed == {"SOLVES", "MATRICES"}
    for spectrum in Spectrum:
        assert spectrum.allows(factorize_for([row(spectrum.name)], AUTO))
        assert spectrum.allows(Factorize())


def test_records_hold_the_whole_setting():
    how = Factorize("auto", 5, 64, eigh_dim=9)
    assert Factorize(**written(how)) == how
    assert told(how) == "factorize auto, rank 5"
    assert told(Factorize()) == "factorize eigh"
