"""Control of the bilinear claims: does what follows from an edit come, or a name for another name?

    python -m tests.bench.claims.bilinear_control [--seeds 3] [--quick]

When "Christine husband Andrew" is rewritten (`bilinear`), all that Andrew was the answer to follows
from the new fact, so that a model which just says the new name for the old one is right in all of
it. Here "Arthur sister Victoria" is rewritten, in families whose facts were all trained on. Of what
Victoria was the answer to, two facts follow, and the rest do not:

    follows       "Christopher daughter" and "Penelope daughter" are answered by the new person
    substituted   "James wife", "Colin mother" and "Charlotte mother" are, though none of it follows

    carries       In the model with weight decay more follows than is substituted.

By every method of `bilinear`, at the strengths of `bilinear`. Each seed's numbers are kept in
`out`, and a second run takes them from there.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jedit.data.invented.families import SISTER, Fact, Facts, Families, fact_rows, rewrite
from jedit.recipes.scenes.families import Room, Size, room
from tests.bench.claims import bilinear
from tests.bench.claims.bilinear_edits import Case, Sets, edits, measured
from tests.bench.claims.evidence import kept, known_interval, parser, shown, write

NAME = "bilinear_control"
CASES = 10
FOLLOWS, SUBSTITUTED = "follows", "substituted"
FIELDS = ("reached", FOLLOWS, SUBSTITUTED, "locality")


def substituted(families: Families, old: Fact, new_object: int, of_others: Facts) -> Facts:
    """Return what the old person was the answer to and the edit leaves alone, with the new name."""
    asked = families.facts[families.facts[:, 2] == old.object]
    follows = {(s, r) for s, r, _ in of_others.tolist()} | {(old.subject, old.relation)}
    left = [(s, r, new_object) for s, r, _ in asked.tolist() if (s, r) not in follows]
    return np.array(left, np.int32)


def sets_of(found: Room, number: int, *, seed: int) -> Sets:
    """Draw the facts to be rewritten, of families without withheld facts, and strangers."""
    families = found.families
    lost = np.unique(families.family[families.is_withheld])
    whole = np.random.default_rng(seed).permutation(np.setdiff1d(families.family, lost))
    edited, donors, rest = np.split(whole, [number, 2 * number])
    cases = []
    for family, donor in zip(map(int, edited), map(int, donors), strict=True):
        old = Fact(families.token("Arthur", family), SISTER, families.token("Victoria", family))
        stranger = families.token("Jennifer", donor)
        new = rewrite(families, old, stranger)
        kinds = {
            FOLLOWS: new.of_others,
            SUBSTITUTED: substituted(families, old, stranger, new.of_others),
        }
        rows = {kind: fact_rows(facts) for kind, facts in kinds.items()}
        cases.append(Case(fact_rows([new.new]), rows, fact_rows(new.unrelated), True))
    retain, heldout = (
        fact_rows(families.of(part.tolist(), withheld=False))
        for part in np.array_split(np.concatenate([rest, lost]), 2)
    )
    return Sets(cases, retain, heldout)


def of_seed(seed: int, size: Size, cases: int) -> dict[str, Any]:
    """Train one model with weight decay, and edit it by every method."""
    found = room(seed, bilinear.TRAININGS[bilinear.DECAYED], size)
    sets = sets_of(found, cases, seed=seed)
    key = jax.random.fold_in(jax.random.key(seed), 9)
    methods = {}
    for name, made in edits(found, sets, key=key):
        methods[name] = measured(found, sets, made)
        print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
    return {"edits": methods}


def of_method(run: dict[str, Any], name: str) -> dict[str, float]:
    """One method's means over the cases that it brought to the target."""
    made = run["edits"][name]
    told = {f: float(np.mean(made["cases"][f])) if made["cases"] else np.nan for f in FIELDS[1:]}
    return {"reached": made["reached"], **told, "less": told[FOLLOWS] - told[SUBSTITUTED]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds and print the table."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    given = options.parse_args(arguments)
    size, cases = (bilinear.QUICK, 1) if given.quick else (Size(), CASES)
    settings = bilinear.settings_of(size, bilinear.TRAININGS[bilinear.DECAYED], cases)
    runs = []
    for seed in range(given.seeds):
        path = given.out / f"{NAME}-{'quick-' * given.quick}{seed}.json"
        runs.append(kept(path, settings, functools.partial(of_seed, seed, size, cases)))
    found = {}
    print("| method | " + " | ".join([*FIELDS, f"{FOLLOWS} less {SUBSTITUTED}"]) + " |")
    print("| --- " * (2 + len(FIELDS)) + "|")
    for name in runs[0]["edits"]:
        told = [of_method(run, name) for run in runs]
        found[name] = {field: known_interval([one[field] for one in told]) for field in told[0]}
        cells = [shown(x, 2) if x["seeds"] else "-" for x in found[name].values()]
        print(f"| {name} | {' | '.join(cells)} |")
    write(NAME, given.out, {"edits": found})


if __name__ == "__main__":
    main()
