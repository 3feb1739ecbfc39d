"""What an audit of two folders found, as values: measures with intervals, and findings by rules."""

import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jedit.report.table import number

# The models that are measured, by the names that the JSON has, in the order of the page's columns.
# "unseen" is the edited model asked about rows that nobody trained on.
COLUMNS = {
    "base": "original model",
    "edited": "edited model",
    "retrained": "retrained model",
    "unseen": "edited model, unseen rows",
}


class Estimate(NamedTuple):
    """A number that was measured on rows, with its 95% interval.

    Attributes:
        value: the number itself.
        low: lower end of the interval.
        high: upper end of the interval.
        num_rows: number of rows that it stands on; of two sets of rows the smaller one's.
    """

    value: float
    low: float
    high: float
    num_rows: int

    @property
    def text(self) -> str:
        """Return the number with its interval."""
        if math.isnan(self.low):
            return number(self.value)
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


class Measure(NamedTuple):
    """One measure of all models.

    Attributes:
        name: its name in the JSON.
        text: what it is, in words.
        how: how the intervals were made.
        models: the estimates by a name of `COLUMNS`; those that could not be had are left out.
    """

    name: str
    text: str
    how: str
    models: Mapping[str, Estimate]


class Outcome(enum.Enum):
    """What a rule says of a measure, with the word that the page has for it."""

    PASSED = "yes"
    FAILED = "no"
    UNDECIDED = "cannot tell"
    NOT_MEASURED = "not measured"


class Finding(NamedTuple):
    """What one stated rule says.

    Attributes:
        rule: name of the rule.
        section: name of the section that it belongs to.
        question: the question that the rule answers; yes is good.
        outcome: the answer.
        sentence: the answer in words, with its numbers.
        estimate: what was judged; None where nothing was measured.
        limit: the threshold, in words.
        source: where the threshold comes from.
    """

    rule: str
    section: str
    question: str
    outcome: Outcome
    sentence: str
    estimate: Estimate | None
    limit: str
    source: str


class Section(NamedTuple):
    """One of the questions of an audit.

    Attributes:
        name: its name in the JSON.
        title: the question.
        lead: what was done to answer it, for readers who are not of the field.
        measures: what was measured of each model.
        groups: what it cost, by group of rows; empty where no group was asked for.
        notes: what else is to be known, such as why something was left out.
        findings: what the rules say.
        curves: what the section's figure shows, by name; see `audit_figure`.
    """

    name: str
    title: str
    lead: str
    measures: Sequence[Measure]
    groups: Sequence[Measure]
    notes: Sequence[str]
    findings: Sequence[Finding]
    curves: Mapping[str, Any]


class Folder(NamedTuple):
    """A folder that was read.

    Attributes:
        role: "base", "edited" or "retrained".
        path: the path it was read from.
        sha256: hash of the table of its files.
        files: size and SHA-256 of each file.
        description: family, number of parameters and their dtype.
    """

    role: str
    path: str
    sha256: str
    files: Mapping[str, tuple[int, str]]
    description: str


class RowSet(NamedTuple):
    """A set of rows, without their texts.

    Attributes:
        name: "forget", "retain" or "unseen".
        given: number of rows that were given.
        hashes: salted hashes of the rows that were asked about, in their order.
        cut_off: number of them that are longer than the models read.
    """

    name: str
    given: int
    hashes: Sequence[str]
    cut_off: int


class Overall(NamedTuple):
    """The verdict: one outcome, a headline, and what it stands on in words."""

    outcome: Outcome
    headline: str
    sentence: str


class Audit(NamedTuple):
    """The results of an audit, and how it was made.

    Attributes:
        overall: the verdict.
        sections: the questions, in their order.
        folders: the folders that were read.
        difference: how the edited weights differ from the original ones, in a sentence.
        rows: the sets of rows.
        settings: the settings by name.
        command: the command line.
        date: when it began, in ISO format.
        seconds: how long it took.
        versions: versions of the software.
        machine: the machine.
        per_row: by measure and column a number for each row, in the order of the rows' hashes.
    """

    overall: Overall
    sections: Sequence[Section]
    folders: Sequence[Folder]
    difference: str
    rows: Sequence[RowSet]
    settings: Mapping[str, Any]
    command: str
    date: str
    seconds: float
    versions: Mapping[str, str]
    machine: Mapping[str, str | int | float]
    per_row: Mapping[str, Mapping[str, Any]]

    @property
    def findings(self) -> list[Finding]:
        """Return the findings of all sections."""
        return [finding for section in self.sections for finding in section.findings]


SCHEMA = "jedit.audit/1"  # raised when a name's meaning changes or a name goes


def audit_json(audit: Audit) -> dict[str, Any]:
    """Return an audit as JSON's own types; what is not finite becomes null."""
    return {"schema": SCHEMA, **_plain(audit)}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
