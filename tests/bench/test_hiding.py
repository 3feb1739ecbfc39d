"""The script of hiding and erasing, on a toy: models are cut to one level, and all is measured."""

import jax
import numpy as np
import pytest

from tests.bench.claims import hiding
from tests.bench.claims.scenes import authors_model

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def setup():
    with jax.numpy_dtype_promotion("standard"):
        yield hiding.Setup(0, authors_model(0, epochs=2, num_authors=6))


def test_a_path_is_cut_where_as_little_is_known(setup):
    path = [setup.original, jax.tree.map(lambda x: 0.5 * x, setup.original)]
    ends = [setup.known(params) for params in path]
    assert ends[1] < ends[0]
    level = np.mean(ends)
    assert setup.known(setup._cut(path, level)) == pytest.approx(level, rel=1e-3)
    assert setup._cut(path, ends[1] / 2) is path[1]
    assert setup._cut(path, 2 * ends[0]) is path[0]


def test_every_number_of_every_model_is_there_and_kept_with_its_settings(
    setup, monkeypatch, tmp_path
):
    # One attacker: each is compiled for each number of rows.
    monkeypatch.setattr(hiding, "ATTACKERS", {1e-3: hiding.ATTACKERS[1e-3]})
    monkeypatch.setattr(hiding, "LOOKS", (1,))
    names = ("GradDiff", "Ssiuu (0.01)")
    few = {name: hiding.METHODS[name]._replace(steps=2) for name in names}
    runs = [hiding.of_seed(few, lambda: setup, tmp_path / "0.json")] * 2
    found, text = hiding.table(runs)
    assert list(found) == ["untouched", "retrained", *names]
    assert set(found["GradDiff"]) == set(hiding.COLUMNS)
    values = [x["mean"] for row in found.values() for x in row.values()]
    assert np.all(np.isfinite(values))
    assert found["untouched"]["D+"]["mean"] == found["untouched"]["D-"]["mean"] == 0
    assert text.count("\n") == 5
    # What is kept is read again, but not under other settings.
    made = []

    def again(_, name, *__):
        made.append(name)
        return runs[0][name]

    monkeypatch.setattr(hiding, "measured_of", again)
    few["GradDiff"] = few["GradDiff"]._replace(rate=1.0)
    assert hiding.of_seed(few, lambda: setup, tmp_path / "0.json") == runs[0]
    assert made == ["GradDiff"]
