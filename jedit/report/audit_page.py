"""An audit as one self-contained HTML page, as JSON, and as a folder with both."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jedit.report.audit_figure import figures_of
from jedit.report.audit_results import COLUMNS, Audit, Measure, Outcome, Section, audit_json
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
    there is replaced, all of it at once.

    Raises:
        ValueError: a destination that `check_audit_destination` refuses.
    """
    check_audit_destination(out)

    def write(new: Path) -> None:
        text = json.dumps(audit_json(audit), indent=1, allow_nan=False, ensure_ascii=False)
        (new / NUMBERS).write_text(text + "\n", encoding="utf-8")
        (new / PAGE).write_text(audit_page(audit), encoding="utf-8")
        (new / SALT).touch(mode=0o600)
        (new / SALT).write_text(salt.hex() + "\n", encoding="ascii")

    replace_folder(out, write)
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
        }
        for section in audit.sections
    ]
    template = environment().get_template("audit.html")
    return template.render(
        audit=audit, sections=sections, classes=CLASSES, roles=COLUMNS, colour=CLASSES.get
    )


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
    rows = []
    for measure in section.groups:
        cells = [str(measure.models["kl"].num_rows)]
        cells += [measure.models[name].text for name in ("kl", "base", "edited")]
        rows.append((measure.text, cells))
    headings = ["rows", "KL, nats per token", "perplexity before", "perplexity after"]
    return Table(headings, rows, sorted({measure.how for measure in section.groups}))
