"""One self-contained HTML page: the figure, the tables, what was run, and some answers."""

import base64
import html
import io
from collections.abc import Iterable

from jedit.report.figure import caption, save_png, tradeoff_figure
from jedit.report.leaderboard import (
    MEASURES,
    Measure,
    leaderboard_columns,
    leaderboard_rows,
)
from jedit.report.results import OTHER_RULE, Comparison, Run
from jedit.report.table import Row, all_rows, best_rows, number, shown_columns

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; }
h2 { font-size: 1.25rem; border-bottom: 2px solid #1a1a1a; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.facts, .small { color: #555; font-size: .85rem; }
img { max-width: 100%; display: block; margin: .8rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .78rem; font-variant-numeric: tabular-nums; }
th, td { padding: .26rem .42rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { border-bottom: 1.5px solid #1a1a1a; vertical-align: bottom; white-space: pre; }
td { border-bottom: 1px solid #e2e2e2; }
td.text, th.text { text-align: left; }
td.long { white-space: normal; min-width: 11rem; text-align: left; }
tr.reference td { background: #f4f4f4; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; font-size: .85rem; }
dt { font-weight: 600; } dd { margin: 0; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
code { background: #f4f4f4; padding: .1rem .3rem; }
"""


def page(run: Run) -> str:
    """The whole page as text; it asks the network for nothing."""
    title = "jedit: what was forgotten, and what it cost"
    parts = [f"<h1>{title}</h1>", _facts(run)]
    if len(run.comparisons) > 1:
        links = (f'<a href="#{_text(c.name)}">{_text(c.title)}</a>' for c in run.comparisons)
        parts.append(f"<p>{' · '.join(links)}</p>")
    parts += [_section(comparison) for comparison in run.comparisons]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _facts(run: Run) -> str:
    machine = ", ".join(
        f"{name.replace('_gib', ' (GiB)')} {value}" for name, value in run.machine.items()
    )
    versions = ", ".join(f"{name} {value}" for name, value in run.versions.items())
    return (
        f'<p class="facts"><code>{_text(run.command)}</code><br>{_text(run.date)}, '
        f"seed {run.seed}, {run.seconds:.0f} s in all, "
        f"peak memory {run.peak_memory_gib:.1f} GiB<br>"
        f"{_text(machine)}<br>{_text(versions)}</p>"
    )


def _section(comparison: Comparison) -> str:
    image = io.BytesIO()
    save_png(tradeoff_figure(comparison), image)
    data = base64.b64encode(image.getvalue()).decode()
    rule = comparison.rule
    parts = [
        f'<h2 id="{_text(comparison.name)}">{_text(comparison.title)}</h2>',
        *(f"<p>{_text(note)}</p>" for note in comparison.notes),
        f'<img alt="Trade-off of forgetting and retaining, {_text(comparison.title)}" '
        f'src="data:image/png;base64,{data}">',
        f'<p class="small">{_text(caption(comparison))}</p>',
        "<h3>Each method at its best point</h3>",
        f'<p class="small">{_text(rule)} The retrained model is used to choose, for all methods '
        "alike.</p>",
        _table(comparison, best_rows(comparison)),
        f'<p class="small">{_text(OTHER_RULE)}</p>',
        _table(comparison, best_rows(comparison, by_loss=True)),
        _meanings(comparison),
    ]
    if comparison.leaderboard:
        parts += ["<h3>The same models by every metric</h3>", _leaderboard(comparison)]
    if comparison.answers:
        parts += ["<h3>Answers, before and after</h3>", _answers(comparison)]
    parts += [
        "<h3>What was run</h3>",
        _run_facts(comparison),
        f"<details><summary>All {sum(len(c.points) for c in comparison.curves)} points</summary>",
        _table(comparison, all_rows(comparison)),
        "</details>",
    ]
    return "\n".join(parts)


def _table(comparison: Comparison, rows: Iterable[Row]) -> str:
    columns = shown_columns(comparison)
    headings = [*(c.heading for c in columns), "edit\ns", "fit\ns"]
    head = '<th class="text">model</th><th class="text">setting</th>'
    head += "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    lines = []
    for row in rows:
        cells = ["–" if row.point is None else c.text(row.point) for c in columns]
        cells += [row.edit_seconds, row.fit_seconds]
        kind = ' class="reference"' if row.name in ("untouched", "retrained") else ""
        lines.append(
            f'<tr{kind}><td class="text">{_text(row.name)}</td>'
            f'<td class="text">{_text(row.setting)}</td>'
            + "".join(f"<td>{_text(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    rows_html = "\n".join(lines)
    return f'<div class="wide"><table><tr>{head}</tr>\n{rows_html}\n</table></div>'


def _leaderboard(comparison: Comparison) -> str:
    columns = leaderboard_columns(comparison)
    known = {name: MEASURES.get(name, Measure(name.replace("_", "\n"), name)) for name in columns}
    head = "".join(f"<th>{_text(measure.heading)}</th>" for measure in known.values())
    lines = []
    for name, cells in leaderboard_rows(comparison):
        kind = ' class="reference"' if name in ("untouched", "retrained") else ""
        lines.append(
            f'<tr{kind}><td class="text">{_text(name)}</td>'
            + "".join(f"<td>{_text(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    meanings = [(m.heading.replace("\n", " "), m.meaning) for m in known.values()]
    rows_html = "\n".join(lines)
    return (
        f'<div class="wide"><table><tr><th class="text">model</th>{head}</tr>\n{rows_html}\n'
        f"</table></div><details><summary>What the columns mean</summary>{_pairs(meanings)}"
        "</details>"
    )


def _meanings(comparison: Comparison) -> str:
    pairs = [(c.heading.replace("\n", " "), c.meaning) for c in shown_columns(comparison)]
    pairs.append(("edit s", "seconds of the edit, compiling excluded; of training, for retrained"))
    pairs.append(
        (
            "fit s",
            "seconds of fitting the curvature, once for all edits, without compiling",
        )
    )
    return f"<details><summary>What the columns mean</summary>{_pairs(pairs)}</details>"


def _run_facts(comparison: Comparison) -> str:
    pairs = [(f"rows, {name}", str(value)) for name, value in comparison.num_rows.items()]
    pairs += [(name, _value(value)) for name, value in comparison.settings.items()]
    pairs += [(f"seconds, {name}", number(value)) for name, value in comparison.seconds.items()]
    for method in comparison.methods:
        grid = "; ".join(
            f"{name} in {', '.join(f'{v:g}' for v in values)}"
            for name, values in method.grid.items()
        )
        text = f"{method.description} Curve over {method.strength}. Grid: {grid or 'none'}."
        pairs.append((method.name, text))
    return _pairs(pairs)


def _answers(comparison: Comparison) -> str:
    kinds = ("kind", "question", "true answer", "original", comparison.edited_by, "retrained")
    head = "".join(f'<th class="text">{_text(kind)}</th>' for kind in kinds)
    lines = [
        "<tr>" + "".join(f'<td class="long">{_text(cell)}</td>' for cell in answer) + "</tr>"
        for answer in comparison.answers
    ]
    rows_html = "\n".join(lines)
    return f'<div class="wide"><table><tr>{head}</tr>\n{rows_html}\n</table></div>'


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    items = (f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs)
    return f"<dl>{''.join(items)}</dl>"


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(value: object) -> str:
    return html.escape(str(value))
