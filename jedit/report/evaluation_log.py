"""Evaluations as files in open-unlearning's JSON schema, so that its tools read ours and ours its.

    NAME_EVAL.json       {metric: {"agg_value": number, "value_by_index": {"0": {field: value}}}}
    NAME_SUMMARY.json    {metric: number}

one object per metric, sorted by name; the fields of a row are the metric's own: "prob" and
"avg_loss", "rougeL_recall" and so on, "score" where there is one only.  A membership attack has two
further objects of the same form beside its own, "forget" and "holdout" (`parts` here).

A number that is not finite is written as null, in a row as in an aggregate, and read as NaN: JSON
has no other way to say it, and a model that an ascent has destroyed has infinite losses.  Then
open-unlearning leaves such a row out of its means and such a metric out of its summary; its
Kolmogorov-Smirnov test stops at one.  To be its reference ("retain_model_logs") a log needs the
names of its configuration: "forget_truth_ratio" with the field "score", "mia_min_k" and so on.

Under a name of open-unlearning's stands what it defines by that name, under "jedit_NAME" what jedit
does, where that is something else: `jedit.recipes.tofu.log` makes such a log.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

AGGREGATE, ROWS = "agg_value", "value_by_index"


class Evaluation(NamedTuple):
    """The results of one metric, as a whole and row by row.

    Attributes:
        aggregate: the metric's one number; None, or not finite: there is none.
        rows: values by field, one for each of n rows: an array (n,) or (n, k), or n texts.
        index: n names of the rows, the numbers in their data set; None: 0 to n - 1.
        parts: further evaluations beside this one, by name.
    """

    aggregate: float | None
    rows: Mapping[str, Any] = {}
    index: Sequence[int] | None = None
    parts: Mapping[str, Self] = {}


def write_evaluation_log(
    evaluations: Mapping[str, Evaluation], folder: Path, *, name: str = "TOFU"
) -> Path:
    """Write both files into the folder, which is made, and return the path of the first.

    Each replaces an older one of its name at once. What else the older one held is lost: read it
    and add to it to keep it.

    Raises:
        ValueError: if the fields of a metric do not have as many rows as each other or as `index`
            has names, a row's name stands twice, or a part is named as the schema's own keys are.
    """
    log = {metric: _to_json(metric, evaluations[metric]) for metric in sorted(evaluations)}
    values = {metric: entry.get(AGGREGATE) for metric, entry in log.items()}
    summary = {metric: value for metric, value in values.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_EVAL.json"
    _write(log, path)
    _write(summary, folder / f"{name}_SUMMARY.json")
    return path


def read_evaluation_log(path: Path) -> dict[str, Evaluation]:
    """Read a log, jedit's or open-unlearning's.

    Fields come back as float64 arrays, (n,) or (n, k), if all there is are numbers, and else as
    lists; a row or a field that is null or missing is NaN. Other keys of a metric than the schema's
    and its parts are passed over.

    Raises:
        ValueError: if the file is not such a log.
    """
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(log, dict) or not all(_is_entry(entry) for entry in log.values()):
        raise ValueError(
            f"{path}: expected one object with {AGGREGATE!r} or {ROWS!r} for each metric"
        )
    try:
        return {metric: _from_json(entry) for metric, entry in log.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: an aggregate must be a number or null, and a row an object with a number for "
            f"its name ({error})"
        ) from None


def _to_json(metric: str, evaluation: Evaluation) -> dict[str, Any]:
    if not {AGGREGATE, ROWS}.isdisjoint(evaluation.parts):
        raise ValueError(f"{metric}: a part may not be named {AGGREGATE!r} or {ROWS!r}")
    entry: dict[str, Any] = {
        part: _to_json(f"{metric}, {part}", evaluation.parts[part]) for part in evaluation.parts
    }
    entry[AGGREGATE] = _plain(evaluation.aggregate)
    if evaluation.rows:
        columns = {
            field: _plain(values if _is_texts(values) else np.asarray(values).tolist())
            for field, values in evaluation.rows.items()
        }
        lengths = {field: len(values) for field, values in columns.items()}
        num_rows = next(iter(lengths.values()))
        index = range(num_rows) if evaluation.index is None else evaluation.index
        names = [str(int(i)) for i in index]
        if set(lengths.values()) != {len(names)}:
            raise ValueError(f"{metric}: {len(names)} names of rows, but rows of fields {lengths}")
        if len(set(names)) != len(names):
            raise ValueError(f"{metric}: a row's name stands twice in its index")
        entry[ROWS] = {
            row: {field: values[i] for field, values in columns.items()}
            for i, row in enumerate(names)
        }
    return entry


def _from_json(entry: Mapping[str, Any]) -> Evaluation:
    by_index = entry.get(ROWS) or {}
    rows = [row or {} for row in by_index.values()]
    fields = dict.fromkeys(field for row in rows for field in row)
    aggregate = entry.get(AGGREGATE)
    return Evaluation(
        math.nan if aggregate is None else float(aggregate),
        {field: _column([row.get(field) for row in rows]) for field in fields},
        [int(row) for row in by_index] or None,
        {
            key: _from_json(part)
            for key, part in entry.items()
            if key not in (AGGREGATE, ROWS) and _is_entry(part)
        },
    )


def _column(values: list[Any]) -> Any:
    """Return an array if all values are numbers or null, or lists of as many of them each."""
    lengths = {len(value) if isinstance(value, list) else None for value in values}
    flat = [x for value in values for x in (value if isinstance(value, list) else [value])]
    is_number = [x is None or isinstance(x, (int, float)) for x in flat]
    return np.array(values, np.float64) if len(lengths) == 1 and all(is_number) else values


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def _is_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and any(isinstance(value, str) for value in values)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and not {AGGREGATE, ROWS}.isdisjoint(entry)


def _write(value: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(value, indent=4, allow_nan=False, ensure_ascii=False)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o644)
        # Written beside and renamed: whoever reads meanwhile sees the old file or the new one,
        # whole.
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
