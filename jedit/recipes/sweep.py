"""A sweep: every method, at every point, by every seed: edit, measure, write down, and a table.

A run is written to OUT/runs/NAME.json when it is whole, with what it was made of, and is not made
again: a sweep that was killed goes on at the next run.  At the end come OUT/results.json and
OUT/table.md, with a 95% interval of each number: over the seeds by Student's t where there are
several, else over the rows that were measured by a bootstrap, where the number is one of rows.
"""

import functools
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

from jedit.recipes.environment import machine, versions
from jedit.recipes.progress import Say, tell
from jedit.report.table import number
from jedit.requests.comeback import interval as bootstrap

RUNS, RESULTS, TABLE, MODELS = "runs", "results.json", "table.md", "models"
UNTOUCHED, RETRAINED = "untouched", "retrained"
REFERENCES = (UNTOUCHED, RETRAINED)
RESAMPLES = 1000  # of two sets; as many change the ends of an interval by a twentieth of it
# Of a model's folder, what decides its outputs.
WEIGHTS, WORDS = (".safetensors", ".json", ".model", ".jinja"), ("merges.txt", "vocab.txt")
SECONDS = "The seconds of an edit contain compiling, and the fitting of what it was first to need."


Point = Mapping[str, int | float]  # a method's settings by their names


class Trial(NamedTuple):
    """One run: a method of the sweep, the point of its settings that is tried, and a seed."""

    method: str
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """Return the file's name, of which no two trials have the same."""
        slug = re.sub(r"\W+", "-", self.method).strip("-").lower()
        return f"{slug}-{hash_of([self.method, dict(self.point)])[:8]}-seed{self.seed}"


class Measured(NamedTuple):
    """A number of one model, with the 95% interval over the rows it was measured on, if it has one.

    Attributes:
        value: the number; None where the model leaves it undefined.
        low: lower end of the interval; None: there is no interval.
        high: upper end of the interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


class Found(NamedTuple):
    """What is measured of one model: numbers by their names, and details that JSON can hold."""

    numbers: Mapping[str, Measured]
    details: Any = None


class Sheet(NamedTuple):
    """One table of a benchmark: its title, and the numbers that are its columns, by heading."""

    title: str
    columns: Mapping[str, str]


Record = dict[str, Any]


def mean_over(scores: Sequence[float] | np.ndarray) -> Measured:
    """Return the mean of the rows' scores, with its interval; nothing of no rows."""
    values = np.asarray(scores, np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        return Measured(None)
    if np.ptp(values) == 0:  # rows that are all alike say nothing of others
        return Measured(float(values[0]))
    return Measured(*bootstrap(values))


def compared(
    measure: Callable[[np.ndarray, np.ndarray], float], first: np.ndarray, second: np.ndarray
) -> Measured:
    """Return a number of two sets of rows, such as an AUC, with its interval over both."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return Measured(None)
    rng = np.random.default_rng(0)
    resampled = [
        measure(rng.choice(first, len(first)), rng.choice(second, len(second)))
        for _ in range(RESAMPLES)
    ]
    if np.ptp(resampled) == 0:  # as where the sets lie wholly apart, which is not certain of others
        return Measured(measure(first, second))
    low, high = np.quantile(resampled, (0.025, 0.975)).tolist()
    return Measured(measure(first, second), low, high)


def interval(values: Sequence[float] | Float[np.ndarray, " n"]) -> dict[str, Any]:
    """Return the mean of one value a seed, with the half width of its 95% interval by Student's t.

    Of one value there is no interval, and the half width is NaN.
    """
    from scipy import stats

    x = np.asarray(values, np.float64)
    half = stats.t.ppf(0.975, len(x) - 1) * stats.sem(x) if len(x) > 1 else math.nan
    return {"mean": float(x.mean()), "half_width": float(half), "values": x.tolist()}


def hash_of(value: Any) -> str:
    """Return the SHA-256 of a value that JSON can hold."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_hash(folder: Path) -> str:
    """Return the SHA-256 of a model folder's weights, settings and tokenizer, by their names."""
    whole = hashlib.sha256()
    decides = (p for p in folder.iterdir() if p.suffix in WEIGHTS or p.name in WORDS)
    for file in sorted(p for p in decides if p.is_file()):
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{file.name} {found}\n".encode())
    return whole.hexdigest()


def check_out(out: Path) -> None:
    """Refuse a folder that holds what no sweep has written.

    Names that begin with a dot are passed over: a run that was killed may have left some.

    Raises:
        ValueError: `out` is a file, or has other things in it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; --out names a folder")
    known = {RUNS, RESULTS, TABLE, MODELS}
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    foreign = sorted(name for name in names - known if not name.startswith("."))
    if foreign:
        raise ValueError(
            f"{out}: holds files that no such run has written ({', '.join(foreign[:3])}); give "
            "another --out, or empty the folder"
        )


def sweep(
    trials: Sequence[Trial],
    out: Path,
    about: Mapping[str, Any],
    *,
    edit: Callable[[Trial], PyTree],
    evaluate: Callable[[PyTree], Found],
    say: Say,
) -> list[Record]:
    """Make every run that does not stand in `out` yet, and return the records of all.

    Args:
        trials: the runs, in the order in which they are made; one given twice is made once.
        out: folder of the records.
        about: what the runs are made of, as JSON can hold it: the model's hash, the settings. A
            record that says otherwise is refused.
        edit: makes a trial's parameters.
        evaluate: measures them.
        say: a watcher, told of each run.

    Raises:
        ValueError: a file of `out` is no record, or one of something else.
    """
    about = json.loads(json.dumps(about))  # as it will be read: tuples are lists
    (out / RUNS).mkdir(parents=True, exist_ok=True)
    trials = list({trial.name: trial for trial in trials}.values())
    records = {trial.name: _read(out, trial, about) for trial in trials}
    missing = [trial for trial in trials if records[trial.name] is None]
    if len(missing) < len(trials):
        say(f"{len(trials) - len(missing)} of {len(trials)} runs stand in {out / RUNS} already")
    for i, trial in enumerate(missing):
        say(f"run {i + 1} of {len(missing)}: {described(trial)}")
        tell(say, i, len(missing))
        start = time.perf_counter()
        params = jax.block_until_ready(edit(trial))
        made = time.perf_counter()
        found = evaluate(params)
        del params  # the next edit needs the room
        records[trial.name] = _write(
            out / RUNS / f"{trial.name}.json",
            {
                "method": trial.method,
                "point": dict(trial.point),
                "seed": trial.seed,
                "about": about,
                "date": datetime.now().astimezone().isoformat(timespec="seconds"),
                "seconds": {"edit": made - start, "evaluate": time.perf_counter() - made},
                "versions": versions(),
                "machine": machine(),
                "numbers": {name: x._asdict() for name, x in found.numbers.items()},
                "details": found.details,
            },
        )
    return [record for record in records.values() if record is not None]


def described(trial: Trial) -> str:
    """Write a trial in words."""
    return ", ".join(part for part in (trial.method, point_text(trial.point)) if part) + (
        f", seed {trial.seed}"
    )


def point_text(point: Point) -> str:
    """Write a point's settings in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in point.items())


def summary(records: Iterable[Record]) -> list[Record]:
    """Return each method's numbers at each point: over the seeds, or over the rows of the one seed.

    Each number has its mean, `low` and `high`, None where there is no interval; `passes` counts the
    seeds.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(hash_of([record["method"], record["point"]]), []).append(record)
    rows = []
    for group in groups.values():
        names = dict.fromkeys(name for record in group for name in record["numbers"])
        seconds = [record["seconds"]["edit"] for record in group]
        rows.append(
            {
                "method": group[0]["method"],
                "point": group[0]["point"],
                "seeds": [record["seed"] for record in group],
                "edit_seconds": float(np.mean(seconds)),
                "numbers": {name: _over_seeds(group, name) for name in names},
            }
        )
    return rows


def _over_seeds(group: list[Record], name: str) -> dict[str, float | None]:
    found = [record["numbers"].get(name, Measured(None)._asdict()) for record in group]
    if len(found) == 1:
        return found[0]
    values = [x["value"] for x in found]
    if any(value is None for value in values):
        return Measured(None)._asdict()
    if np.ptp(values) == 0:  # seeds that are all alike say nothing of others
        return Measured(values[0])._asdict()
    over = interval(values)
    low, high = (over["mean"] + sign * over["half_width"] for sign in (-1, 1))
    return Measured(over["mean"], low, high)._asdict()


def how_intervals(records: Sequence[Record]) -> str:
    """Say what the intervals of a table are taken over."""
    seeds = {record["seed"] for record in records}
    if len(seeds) > 1:
        return (
            f"Means of {len(seeds)} seeds, with 95% intervals by Student's t; models that no seed "
            "changes are measured once, with intervals over the rows."
        )
    return (
        f"One seed, {min(seeds)}; 95% intervals are a bootstrap's over the rows that were asked."
        if seeds
        else "There are no runs."
    )


def tables(
    rows: Sequence[Record], sheets: Sequence[Sheet], *, is_timed: bool = True
) -> list[tuple[str, list[list[str]]]]:
    """Lay the summary out: for each sheet its title, and its lines, the heading first.

    Args:
        rows: the summary.
        sheets: the tables' columns.
        is_timed: whether the last column is the seconds of the edits.
    """
    found = []
    for sheet in sheets:
        columns = {
            heading: name
            for heading, name in sheet.columns.items()
            if any(name in row["numbers"] for row in rows)
        }
        if columns:
            lines = [["model", "point", *columns, *(["edit s"] if is_timed else [])]]
            for row in rows:
                cells = [shown(row["numbers"].get(name)) for name in columns.values()]
                seconds = "" if row["method"] in REFERENCES else number(row["edit_seconds"])
                timed = [seconds] if is_timed else []
                lines.append([row["method"], point_text(row["point"]), *cells, *timed])
            found.append((sheet.title, lines))
    return found


def shown(measured: Mapping[str, float | None] | None) -> str:
    """Write a number with its interval."""
    if measured is None or measured["value"] is None:
        return "–"
    if measured["low"] is None or measured["high"] is None:
        return number(measured["value"])
    return f"{number(measured['value'])} [{number(measured['low'])}, {number(measured['high'])}]"


def finish(
    out: Path,
    title: str,
    about: Mapping[str, Any],
    records: Sequence[Record],
    sheets: Sequence[Sheet],
    notes: Sequence[str] = (),
    chosen: Sequence[Record] = (),
    *,
    is_timed: bool = True,
) -> list[tuple[str, list[list[str]]]]:
    """Write results.json and table.md, and return the tables.

    Args:
        out: folder of both.
        title: the tables' common title.
        about: what the runs were made of.
        records: the records of all runs.
        sheets: the tables' columns.
        notes: sentences that stand below the title.
        chosen: some of the records, which get tables of their own in front.
        is_timed: whether the tables have the seconds of the edits; not, where a benchmark takes
            its own.
    """
    rows = summary(records)
    best = summary(chosen)
    lay = functools.partial(tables, sheets=sheets, is_timed=is_timed)
    laid_out = [(f"Chosen: {heading}", lines) for heading, lines in lay(best)] + lay(rows)
    how = how_intervals(records)
    edits = [record for record in chosen if record["method"] not in REFERENCES]
    # Those that are chosen have not all the seeds.
    how_chosen = f"Chosen: {how_intervals(edits)}" if edits else None
    notes = [*([how_chosen] if how_chosen else []), *notes, *([SECONDS] if is_timed else [])]
    lines = [f"# {title}", "", how, *notes]
    for heading, table in laid_out:
        lines += ["", f"## {heading}", "", _line(table[0]), "|" + " --- |" * len(table[0])]
        lines += [_line(cells) for cells in table[1:]]
    _write(
        out / RESULTS,
        {
            "title": title,
            "about": about,
            "intervals": how,
            "notes": notes,
            "versions": versions(),
            "machine": machine(),
            "summary": rows,
            "chosen": best,
            "runs": sorted(
                f"{RUNS}/{Trial(r['method'], r['point'], r['seed']).name}.json" for r in records
            ),
        },
    )
    _replace(out / TABLE, "\n".join(lines) + "\n")
    return laid_out


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _read(out: Path, trial: Trial, about: Mapping[str, Any]) -> Record | None:
    """Read a run's record, if there is one.

    Raises:
        ValueError: the file is no record of this trial.
    """
    file = out / RUNS / f"{trial.name}.json"
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        record = None
    if not (isinstance(record, dict) and _is_record(record, trial)):
        raise ValueError(f"{file}: is no record of a run; remove it, and the run is made again")
    if record["about"] != about:
        theirs = record["about"]
        differing = sorted(k for k in theirs | dict(about) if theirs.get(k) != about.get(k))
        raise ValueError(
            f"{file}: was made with another {', '.join(differing[:3])}; give another --out, or "
            "remove it, and the run is made again"
        )
    return record


def _is_record(record: Record, trial: Trial) -> bool:
    numbers, seconds = record.get("numbers"), record.get("seconds")
    return (
        (record.get("method"), record.get("point"), record.get("seed"))
        == (trial.method, dict(trial.point), trial.seed)
        and isinstance(record.get("about"), dict)
        and isinstance(seconds, dict)
        and isinstance(seconds.get("edit"), int | float)
        and isinstance(numbers, dict)
        and all(
            isinstance(x, dict)
            and set(x) == set(Measured._fields)
            and all(v is None or isinstance(v, int | float) for v in x.values())
            for x in numbers.values()
        )
    )


def _write(file: Path, value: Record) -> Record:
    """Write JSON, whole or not at all; what is not finite is null."""
    clean = _finite(value)
    _replace(file, json.dumps(clean, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return clean


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
