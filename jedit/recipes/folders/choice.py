"""Which method edits a folder's model: those of the catalogue that suit it, and natural steps."""

from collections.abc import Sequence

from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import ByDraws, BySteps, Need, Pace, Row
from jedit.recipes.factorizing import FITTED
from jedit.recipes.tofu.presets import FINE_TUNING

NATURAL = "natural"
NATURAL_TEXT = "Natural steps that stop by themselves, then a recovery: `jedit.forget` (ours)."
# What neither a folder nor its rows can give.
UNSUITED = {
    Need.NUM_CLASSES: "it draws wrong labels out of a classifier's classes, and the next token of "
    "a text has none",
}
# The larger of the two rates that TOFU's checkpoint preset tries, for each pace; where it tries
# none, open-unlearning's.
RATES = {pace: FINE_TUNING.rates.get(pace, (1e-5,))[-1] for pace in Pace}


def method_named(name: str) -> Row | None:
    """Return the catalogue's row of a name, or None for natural steps.

    Letters and digits are compared alone; a name without its bracket is the first of its kind, so
    that "kfade" is "K-FADE (K-FAC)".

    Raises:
        ValueError: there is no such method, or it does not suit a language model with rows.
    """
    wanted = _letters(name)
    if wanted == NATURAL:
        return None
    rows = list(CATALOGUE.values())
    families = {_letters(row.name.partition(" (")[0]): row for row in reversed(rows)}
    row = (families | {_letters(row.name): row for row in rows}).get(wanted)
    if row is None:
        names = ", ".join(name for name, _ in methods())
        raise ValueError(f"there is no method {name!r}; there are {names}")
    if reason := _unsuited(row):
        raise ValueError(f"{row.name} does not suit a language model: {reason}")
    return row


def methods() -> list[tuple[str, str]]:
    """Return name and description of every method that suits, the default first."""
    rows = [(row.name, row.description) for row in CATALOGUE.values() if not _unsuited(row)]
    return [(NATURAL, NATURAL_TEXT), *rows]


def check_settings(row: Row | None, given: Sequence[str]) -> None:
    """Refuse settings that would not be looked at.

    Args:
        row: the method; None: natural steps.
        given: names of the settings that were given.

    Raises:
        ValueError: the first such setting.
    """
    natural = {"recovery", "base", "rewind", "rewind_rate"}
    for name in given:
        if row is not None and name in natural:
            raise ValueError(f"{_option(name)} is only looked at with --method natural")
        if name == "learning_rate" and row is None:
            raise ValueError("--learning-rate would not be looked at: natural steps have none")
        if name in ("steps", "learning_rate") and not isinstance(row, BySteps | ByDraws | None):
            raise ValueError(f"{_option(name)} would not be looked at: {row.name} takes no steps")
    if "base" in given and {"select", "layers"} & set(given):
        raise ValueError(
            "--base edits all parameters; --select and --layers would not be looked at"
        )
    if "temperature" in given and row and not row.needs & {Need.CURVATURE, Need.CORRECTED}:
        raise ValueError(f"--temperature would not be looked at: {row.name} has no curvature")
    for name in ("factorize", "rank", "max_dim"):
        if name in given and row and not row.needs & FITTED:
            raise ValueError(f"{_option(name)} would not be looked at: {row.name} has no curvature")
    if "base" not in given and (rest := [x for x in given if x in ("rewind", "rewind_rate")]):
        raise ValueError(f"{_option(rest[0])} is only looked at with --base")


def check_rows(row: Row | None, unseen: Sequence[object]) -> None:
    """Refuse a method that needs rows that are not there.

    Args:
        row: the method; None: natural steps.
        unseen: rows that the model was not trained on.

    Raises:
        ValueError: it needs some, and there are none.
    """
    if row is not None and Need.LATENTS in row.needs and not unseen:
        raise ValueError(
            f"{row.name} compares with rows that the model was not trained on, and there are none: "
            "give some (--unseen FILE), of the same kind as the rows to forget, about other people"
        )


def _unsuited(row: Row) -> str | None:
    return next((reason for need, reason in UNSUITED.items() if need in row.needs), None)


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
