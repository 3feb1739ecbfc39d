"""Programs that nobody wrote, against the oracle."""

import os

import hypothesis
import pytest

from tests.tracing import fuzz
from tests.tracing.oracle import check_capture
from tests.tracing.programs import INPUTS, programs

EXAMPLES = int(os.environ.get("JEDIT_TEST_PROGRAMS", "100"))


@pytest.mark.float64  # rounding in a straight-through estimator: no tolerance but float64's is fair
@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize="JEDIT_TEST_PROGRAMS" not in os.environ,
    phases=[p for p in hypothesis.Phase if p != hypothesis.Phase.explain],
    database=None,
)
@hypothesis.given(programs())
def test_random_programs(program):
    apply, params, uncovered = program
    check_capture(apply, params, INPUTS, uncovered=uncovered)


def test_a_seed_is_one_program_and_its_failure_is_told(capsys, monkeypatch):
    assert list(fuzz.seeds_of("3:5")) == [3, 4]
    assert list(fuzz.seeds_of("7")) == [7]
    first, again = (fuzz.make_program(fuzz.random.Random(11).choice) for _ in range(2))
    assert first[2] == again[2]
    assert {k: v.shape for k, v in first[1].items()} == {k: v.shape for k, v in again[1].items()}

    def wrong(*_, **__):
        raise AssertionError("no such parameter")

    monkeypatch.setattr(fuzz, "check_capture", wrong)
    assert fuzz.main("11:13") == 1
    told = capsys.readouterr().out
    assert "seed 11:" in told
    assert "no such parameter" in told
    assert "2 programs, seeds 11:13: 2 wrong [11, 12]" in told
