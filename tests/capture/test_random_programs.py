"""Programs that nobody wrote, against the oracle."""

import os

import hypothesis
import numpy as np
import pytest

from tests.capture.oracle import check_capture, normal
from tests.capture.programs import BATCH, TIME, VOCAB, WIDTH, programs

INPUTS = {"x": normal(BATCH, TIME, WIDTH), "ids": np.array([[1, 0, VOCAB - 1], [3, 3, 0]])}
EXAMPLES = int(os.environ.get("JEDIT_TEST_PROGRAMS", "200"))


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
