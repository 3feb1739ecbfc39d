"""The run's tables, in Markdown, out of what its stages wrote, whatever became of them."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """Every table of a run that has numbers."""
    stages = found["stages"]
    known = {name: row["found"] for name, row in stages.items() if "found" in row}
    machine = found["machine"]
    toy = " **A toy: its numbers say nothing but that it runs.**" if found["is_toy"] else ""
    parts = [
        f"# {machine['kind']}, jax {machine['versions']['jax']}, {found['date']}",
        f"{found['data']}; seed {found['seed']}; {found.get('seconds', 0):.0f} s.{toy}",
        _stages(stages),
    ]
    if "kernels" in known:
        parts += ["## Kernels", *_kernels(known["kernels"])]
    for name in ("gpt bfloat16", "gpt float32"):
        parts += [part for run in known.get(name, {}).get("runs", ()) for part in _gpt(run)]
    if "edit the folder" in known:
        parts += ["## A random Llama-3.2-1B", *_folder(known)]
    if "requests" in known:
        parts += ["## Many requests", _requests(known["requests"])]
    sizes = [row for name, row in known.items() if name.startswith("decompose")]
    if sizes:
        parts += ["## Of one factor, in float32", _decompositions(sizes)]
    if "peers" in known:
        parts += ["## Factors beside kfac-jax", _peers(known["peers"]["peers"])]
    return "\n\n".join(parts) + "\n"


def _stages(stages: dict[str, Any]) -> str:
    rows = [
        (name, row["state"], _text(row["seconds"]), _text(row["budget"]), row["message"])
        for name, row in stages.items()
    ]
    return _table(("stage", "", "seconds", "at most", ""), rows)


def _kernels(found: dict[str, Any]) -> list[str]:
    if "unchecked" in found:
        parts = [f"Not checked: {found['unchecked']}."]
    else:
        wrong = [row for row in found["checks"] if not row["is_right"]]
        parts = [f"{len(found['checks']) - len(wrong)} of {len(found['checks'])} checks are right."]
        parts += [f"WRONG: {row['name']}, error {row['error']} {row['why']}" for row in wrong]
    rows = [
        (
            row["name"],
            row["contender"],
            *map(_text, (row["seconds"] * 1e3, row["speed"])),
            _text(None if row["temporary"] is None else row["temporary"] / 1e6),
        )
        for row in found["times"]
    ]
    heads = ("operation (shape)", "contender", "ms", "times the first's speed", "memory, MB")
    return [*parts, _table(heads, rows)]


def _gpt(run: dict[str, Any]) -> list[str]:
    names = ("first_seconds", "seconds", "rows", "tokens", "peak_gib", "share", "share_of_both")
    rows = []
    for step in run["steps"]:
        first, seconds, number, tokens, peak, share, both = (step[name] for name in names)
        speeds = (None if x is None else x / seconds for x in (number, tokens))
        cells = (*map(_text, (first, seconds, *speeds, peak)), _percent(share), _percent(both))
        rows.append((step["name"], *cells))
    heads = ("", "first call (compiles), s", "then, s", "rows/s", "tokens/s", "peak so far, GiB")
    heads += ("floor, % of the rate", "with float32 statistics")
    parts = [f"## {run['dtype']}: {run['model']}", _table(heads, rows)]
    if "matmul_rates" in run:
        rates = {name: _text(rate / 1e12) for name, rate in run["matmul_rates"].items()}
        parts.append(
            f"Square products, Tflop/s: {run['dtype']} {rates['peak']}, float32 at full precision "
            f"{rates['full']}."
        )
        if run["dtype"] == "bfloat16":
            parts.append("The aim for the factors is 60% of the rate.")
    if "points" in run:
        columns = ("forget_nll", "heldout_nll", "heldout_kl", "forget_quality", "model_utility")
        rows = [(k, *(_text(v[c]) for c in columns)) for k, v in run["points"].items()]
        parts.append(_table(("", *(c.replace("_", " ") for c in columns)), rows))
    return parts


def _folder(known: dict[str, Any]) -> list[str]:
    found = known["edit the folder"]
    told = known.get("plan the folder", {}).get("phases", {})
    # What the plan calls a phase, and where its most memory has been taken by then.
    same = {"fit": max((told[k] for k in ("fit", "decompose") if k in told), default=None)}
    same["edit"] = told.get("edit")
    rows = []
    for name, row in found.get("phases", {}).items():
        numbers = (row["seconds"], row["of them compiling"], row["device's peak GiB so far"])
        rows.append((name, *map(_text, (*numbers, same.get(name), row["peak GiB"]))))
    heads = ("", "seconds", "of them compiling", "device's peak so far, GiB", "the plan's, GiB")
    heads += ("process's peak, GiB",)
    parts = [_table(heads, rows)]
    if "fit share" in found:
        parts.append(
            f"Weights {_text(found['weights GiB'])} GiB, factors {_text(found['factors GiB'])} GiB "
            f"in {found['groups']} groups; the fit, compiling left out, ran at no more than "
            f"{_percent(found['fit share'])} of the bfloat16 product's "
            f"{_text(found['matmul rate'] / 1e12)} Tflop/s: each group is counted as a whole pass "
            "backward, and some of compiling runs beside the device's work. "
            f"True KL {_text(found['true KL'])} of {found['budget']}, unseen "
            f"{_text(found['unseen KL'])}; forget NLL "
            f"{' to '.join(map(_text, found['forget nll']))}."
        )
    return parts


def _requests(found: dict[str, Any]) -> str:
    names = ("requests a second", "in a loop", "times a loop", "by kfade", "peak_gib")
    rows = [(k, *(_text(row[n]) for n in names)) for k, row in found["sizes"].items()]
    heads = ("parameters", "requests/s", "a loop's", "times a loop", "kfade's", "peak, GiB")
    return _table(heads, rows) + f"\n\nThe aim is {found['target']:.0f} times a loop."


def _decompositions(sizes: Iterable[dict[str, Any]]) -> str:
    heads = ("columns", "", "first call, s", "then, s", "times the product's rate", "residual")
    rows = []
    for found in sorted(sizes, key=lambda one: one["size"]):
        for name, row in found["ways"].items():
            if "error" in row:
                rows.append((str(found["size"]), name, row["error"], "", "", ""))
                continue
            more = "".join(f", {k} {row[k]}" for k in ("rounds", "rank") if k in row)
            numbers = (row["first_seconds"], row["seconds"], row["multiple"], row["residual"])
            rows.append((str(found["size"]), name + more, *map(_text, numbers)))
    return _table((*heads[:1], "what", *heads[2:]), rows)


def _peers(peers: Sequence[dict[str, Any]]) -> str:
    rows = [
        (p["dtype"], p["contender"], f"skipped: {p['skipped']}", "", "")
        if "skipped" in p
        else (
            p["dtype"],
            p["contender"],
            _text(p["seconds"]),
            _percent(p["share"]),
            _text(p["peak_gib"]),
        )
        for p in peers
    ]
    return _table(("", "", "seconds", "floor, % of the rate", "peak, GiB"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(x.replace("|", "/") for x in line) + " |" for line in lines)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
