"""One contender at one job in a process of its own, so that its peak memory is its own.

    python -m tests.bench.child JSON        prints one line of JSON

JSON is what `request` makes. The torch contender reads the same, under an interpreter of its own.
"""

import json
import sys

from tests.bench.cases import CASES, TOYS, Case


def request(case: Case, contender: str, job: str, repeats: int) -> dict:
    """What a child has to know."""
    return {
        "name": case.name,
        "sizes": case.sizes,
        "positions": case.positions,
        "num_examples": case.num_examples,
        "batch": case.batch,
        "matrices": case.matrices,
        "contender": contender,
        "job": job,
        "floor": case.floor(job),
        "repeats": repeats,
        "size": 64 if case in TOYS.values() else 2048,
    }


def run(asked: dict) -> dict:
    """The measurement."""
    from tests.bench.contenders import CONTENDERS
    from tests.bench.measure import measure
    from tests.bench.models import make

    cases = {(c.name, c.sizes): c for c in (*CASES.values(), *TOYS.values())}
    case = cases[asked["name"], tuple(asked["sizes"])]
    prepare, _ = CONTENDERS[asked["contender"]]
    work = prepare(make(case), asked["job"])
    return measure(work, asked["floor"], asked["repeats"], asked["size"])


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
