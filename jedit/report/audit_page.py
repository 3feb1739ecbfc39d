"""An audit as one self-contained HTML page, as JSON, and as a folder with both."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jedit.report.audit_figure import figures_of
from jedit.report.audit_results import (
    COLUMNS,
    Audit,
    Finding,
    Measure,
    Outcome,
    Section,
    audit_json,
)
from jedit.report.page import environment
from jedit.report.writer import PAGE, check_destination, replace_folder

NUMBERS, SALT = "audit.json", "salt.txt"
FILES = (PAGE, NUMBERS, SALT)
# The page's colours are those of a comparison's outcomes.
CLASSES = {
    Outcome.PASSED: "forgot",
    Outcome.FAILED: "remembers",
    Outcome.UNDECIDED: "fair",
    Outcome.NOT_MEASURED: "fair",
}
# What the five sections come to, as questions whose yes is good.
ASKS = {
    "forgotten": "Is it no longer said?",
    "membership": "Does it look as if never seen?",
    "depth": "Is it gone from the inner layers, too?",
    "comeback": "Does it stay gone?",
    "cost": "Was the rest kept?",
}


class Table(NamedTuple):
    """A table of measures: headings, and for each measure a text, cells and how it was bounded."""

    headings: list[str]
    rows: list[tuple[str, list[str]]]
    hows: list[str]


def check_audit_destination(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier audit.

    Raises:
        ValueError: the folder holds something else, or is none.
    """
    check_destination(out, FILES)


def write_audit(audit: Audit, out: Path, *, salt: bytes) -> Path:
    """Write the page, the numbers, and the salt of the rows' hashes, and return the page's path.

    The salt's file is for its owner's eyes alone; it stands in no other file. An earlier audit
    there is replaced, all of it at once.  Where the page cannot be made, the numbers stand there.

    Raises:
        ValueError: a destination that `check_audit_destination` refuses.
    """
    check_audit_destination(out)

    def write(new: Path) -> None:
        text = json.dumps(audit_json(audit), indent=1, allow_nan=False, ensure_ascii=False)
        (new / NUMBERS).write_text(text + "\n", encoding="utf-8")
        (new / SALT).touch(mode=0o600)
        (new / SALT).write_text(salt.hex() + "\n", encoding="ascii")
        try:
            (new / PAGE).write_text(audit_page(audit), encoding="utf-8")
        except Exception as error:  # raised below, when the numbers are safe
            failed.append(error)

    failed: list[Exception] = []
    replace_folder(out, write)
    if failed:
        raise failed[0]
    return out / PAGE


def audit_page(audit: Audit) -> str:
    """Render the page as text; it asks the network for nothing.

    Raises:
        ImportError: jinja2 is not installed.
    """
    sections = [
        {
            "section": section,
            "table": _table(section.measures),
            "groups": _groups(section),
            "figures": figures_of(section),
            "asks": ASKS.get(section.name, section.title),
            "outcome": outcome_of(section),
            "counts": _counts(section),
        }
        for section in audit.sections
    ]
    template = environment().get_template("audit.html")
    return template.render(audit=audit, sections=sections, roles=COLUMNS, colour=CLASSES.get)


def outcome_of(section: Section) -> Outcome:
    """Return the worst answer of a section; what was not measured counts where nothing was."""
    outcomes = {finding.outcome for finding in _judged(section)}
    order = (Outcome.FAILED, Outcome.UNDECIDED, Outcome.PASSED)
    return next((outcome for outcome in order if outcome in outcomes), Outcome.NOT_MEASURED)


def _judged(section: Section) -> list[Finding]:
    """Return the findings that judge the edit; that the rows were known judges it not."""
    return [finding for finding in section.findings if finding.rule != "known"]


def _counts(section: Section) -> str:
    """Return how many of a section's questions have which answer."""
    found = [finding.outcome for finding in _judged(section)]
    counts = ((found.count(outcome), outcome.value) for outcome in Outcome)
    return ", ".join(f"{number} {name}" for number, name in counts if number)


def _table(measures: Sequence[Measure]) -> Table:
    """Return the measures by model; columns that no measure has are left out."""
    roles = [role for role in COLUMNS if any(role in measure.models for measure in measures)]
    rows = [
        (
            measure.text,
            [measure.models[role].text if role in measure.models else "–" for role in roles],
        )
        for measure in measures
    ]
    hows = sorted({measure.how for measure in measures})
    return Table([COLUMNS[role] for role in roles], rows, hows)


def _groups(section: Section) -> Table:
    """Return the cost by group of rows."""
    columns = {
        "kl": "KL, nats per token",
        "near": "near",
        "base": "perplexity before",
        "edited": "perplexity after",
        "refused_base": "refused before",
        "refused_edited": "refused after",
    }
    # Where answers are not asked for, nothing is known of refusals.
    told = [name for name in columns if any(name in m.models for m in section.groups)]
    rows = []
    for measure in section.groups:
        cells = [str(measure.models["kl"].num_rows)]
        rows.append((measure.text, cells + [measure.models[name].text for name in told]))
    headings = ["rows", *(columns[name] for name in told)]
    return Table(headings, rows, sorted({measure.how for measure in section.groups}))
