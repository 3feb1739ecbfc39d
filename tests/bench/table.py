"""The results as a short table, and the claims that they bear out or refute. Imports no JAX."""

from tests.bench.cases import LIMITS


def claims(results: list[dict]) -> list[dict]:
    """Each claim in words, with whether it held; None where it was not measured."""
    rows = {(r["case"], r["job"], r["contender"]): r for r in results if "skipped" not in r}
    out = []
    for (case, job), (most, gib) in LIMITS.items():
        mine = rows.get((case, job, "jedit"))
        if mine is None:
            continue
        where = f"{case} {job}"
        out.append(
            {
                "claim": f"{where}: at most {most} times the floor",
                "measured": mine["multiple"],
                "holds": mine["multiple"] <= most,
            }
        )
        out.append(
            {
                "claim": f"{where}: at most {gib} GiB at the peak",
                "measured": mine["peak_gib"],
                "holds": mine["peak_gib"] <= gib,
            }
        )
        for (_, _, contender), row in rows.items():
            if (row["case"], row["job"]) == (case, job) and contender != "jedit":
                out.append(
                    {
                        "claim": f"{where}: fewer times the floor than {contender}",
                        "measured": mine["multiple"] / row["multiple"],
                        "holds": mine["multiple"] < row["multiple"],
                    }
                )
    return out


def table(results: list[dict], held: list[dict]) -> str:
    """Both, for people."""
    header = (
        "case",
        "job",
        "contender",
        "x floor",
        "quartiles",
        "s",
        "peak GiB",
        "GF/s around",
    )
    rows, skipped = [header], []
    for r in results:
        if "skipped" in r:
            skipped.append(f"skipped: {r['case']} {r['job']}, {r['contender']}: {r['skipped']}")
            continue
        rows.append(
            (
                r["case"],
                r["job"],
                r["contender"],
                f"{r['multiple']:.2f}",
                "{:.2f}-{:.2f}".format(*r["quartiles"]),
                f"{r['seconds']:.2f}",
                f"{r['peak_gib']:.2f}",
                "{:.0f}, {:.0f}".format(*r["rate_gflops"]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += skipped
    if held:
        lines += ["", "claims:"]
        lines += [
            f"  {'holds ' if c['holds'] else 'FAILS '} {c['claim']} ({c['measured']:.2f})"
            for c in held
        ]
    return "\n".join(lines)
