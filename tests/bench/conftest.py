"""Scripts of claims are run by turns where time is short: they are the longest tests there are.

`JEDIT_TEST_CLAIMS=0`, 1 or 2 runs every third file of them; without it all are run.
"""

import os
from pathlib import Path

TURNS = 3
FILES = sorted(p for p in Path(__file__).parent.glob("test_*.py") if ".claims" in p.read_text())

collect_ignore = [
    path.name
    for number, path in enumerate(FILES)
    if "JEDIT_TEST_CLAIMS" in os.environ
    and number % TURNS != int(os.environ["JEDIT_TEST_CLAIMS"]) % TURNS
]
