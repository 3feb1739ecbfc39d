"""The README's Python, run as it stands: python -m tests.readme [WHAT_IS_THERE ...].

`python -m tests.readme --write` writes the catalogue's table of methods beside the methods.

All snippets share one namespace, in their order, as a reader would run them. One that needs
something says so in its first line, "# needs: ..."; it is left out unless an argument of the
command stands in that line.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
METHODS = ROOT / "jedit" / "methods" / "README.md"


def snippets(text):
    """(line, code, what it needs or "") of every Python snippet."""
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        needs = re.match(r"# needs: (.*)", found[1])
        yield text.count("\n", 0, found.start(1)) + 1, found[1], needs[1] if needs else ""


TITLE = """# All methods

Made of the catalogue's rows by `python -m tests.readme --write`. A name stands for its row in
`jedit.methods.CATALOGUE` and, but for those of classifiers, after `jedit forget --method` (in
quotes, or without blanks and brackets); names in one line are variants of the first. *Ours* has no
paper.

"""


def markdown_table() -> str:
    """Return the table of all methods: a line a row, its variants in the same."""
    from jedit.methods.catalogue import ROWS
    from jedit.methods.row import Need

    lines = ["| method | use it for | needs besides two sets | paper |", "|---|---|---|---|"]
    linked = set()
    for row in ROWS:
        if row.variant_of is not None:
            continue
        shown = [row, *(other for other in ROWS if other.variant_of == row.name)]
        papers = dict.fromkeys(number for one in shown for number in one.papers)
        links = []
        for number in papers:  # each is linked once
            is_new = number not in linked
            linked.add(number)
            links.append(f"[{number}](https://arxiv.org/abs/{number})" if is_new else number)
        whose = ["ours"] if row.is_ours else []
        names = ", ".join(one.name for one in shown)
        needs = ", ".join(need.value for need in Need if need in row.needs) or "–"
        lines.append(f"| {names} | {row.when} | {needs} | {', '.join(links + whose) or '–'} |")
    return "\n".join(lines) + "\n"


def check_loop(names):
    """The first loop anyone copies has forgotten something, at the price it states, and stopped."""
    import jedit

    apply, params, edited = (names[n] for n in ("apply", "params", "edited"))
    price = jedit.metrics.output_kl(apply, params, edited, names["retain"])
    assert 0.01 < price <= 0.05, price
    losses = [float(names["loss"](p, names["forget"])[0]) for p in (params, edited)]
    assert losses[1] > losses[0] + 0.5, losses


def main(there):
    """Run them, and say how many."""
    names, number, ran = {}, 0, 0
    for line, code, needs in snippets(README.read_text(encoding="utf-8")):
        number += 1
        if needs and not any(thing in needs for thing in there):
            continue
        # Empty lines in front make a traceback name the README's own line.
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), names)
        ran += 1
        if "state, edited = optimizer.init" in code:
            check_loop(names)
    sys.stdout.write(f"\nran {ran} of {number}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        METHODS.write_text(TITLE + markdown_table(), encoding="utf-8")
    else:
        main(sys.argv[1:])
