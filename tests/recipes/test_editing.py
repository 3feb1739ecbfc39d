"""What benchmarks share: one set of curvatures is held, and a run that is lost ends no sweep."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Factorize
from jedit.methods import CATALOGUE
from jedit.methods.row import Spectrum
from jedit.models import gpt
from jedit.recipes import editing
from jedit.recipes.comparison.compare import searched
from jedit.recipes.editing import OF_TEXTS, PROBE, Editor, Strength, task_of
from jedit.recipes.tofu.models import Start

pytestmark = pytest.mark.usefixtures("standard_promotion")
KFAC, EKFAC, NPO = (CATALOGUE[name] for name in ("K-FADE (K-FAC)", "K-FADE (EK-FAC)", "NPO"))
STRENGTH = Strength(steps=1, batch_size=2, learning_rate=1e-3)
NUM_RETAIN = PROBE + 9


@pytest.fixture(scope="module")
def task():
    key = jax.random.key(0)
    apply, params = gpt(key=key, vocab=12, width=8, num_layers=1, num_heads=2, max_len=5)
    tokens = np.random.default_rng(0).integers(0, 12, (NUM_RETAIN + 4, 6)).astype(np.int32)
    tokens[4:, 0] = np.arange(NUM_RETAIN) % 12
    forget, retain = (
        Batch(rows[:, :-1], jnp.asarray(rows[:, 1:])) for rows in (tokens[:4], tokens[4:])
    )
    start = Start(
        model=cast("Any", SimpleNamespace(apply=apply, chunk=8)),
        params=params,
        retrained=None,
        select="kernel",
        hidden_site="",
        layers=(),
        stream=cast("Any", None),
        description=cast("Any", None),
    )
    return task_of(start, forget, retain), retain


def test_curvatures_are_held_for_one_need_and_at_one_temperature(task):
    said = []
    editor = Editor(task[0], OF_TEXTS, say=said.append, temperatures=(1.0, 2.0))

    def run(row, seed=0):
        del said[:]
        editor(row, STRENGTH.point(row), seed)
        return len([text for text in said if text.startswith("fitting")])

    # Where nothing is needed, what is held stays.
    assert [run(row) for row in (NPO, KFAC, NPO, KFAC, EKFAC, KFAC)] == [0, 1, 0, 0, 1, 1]
    assert len(editor._fitted) == 1
    assert run(KFAC, seed=1) == 1


def test_auto_comes_to_what_each_method_takes_of_its_factors(task, monkeypatch):
    """No eigenvectors for K-FADE, and all of them for a method that takes all, of every axis."""
    said, forms = [], []

    def ran(method, *given, run=editing.run_method, **rest):
        curvature = method.keywords["curvature"]
        forms.append({factor.form for factor in curvature.factors.values()} - {"diagonal"})
        return run(method, *given, **rest)

    monkeypatch.setattr(editing, "run_method", ran)
    auto = Factorize("auto", eigh_dim=1)
    editor = Editor(task[0], OF_TEXTS, say=said.append, factorize=auto)
    every = dataclasses.replace(KFAC, spectrum=Spectrum.ALL)
    for row in (KFAC, every, KFAC):
        params = editor(row, STRENGTH.point(row), 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert forms == [{"undecomposed"}, {"eigenbasis"}, {"undecomposed"}]
    del said[:]
    editor = Editor(task[0], OF_TEXTS, say=said.append, factorize=Factorize("cholesky"))
    with pytest.raises(
        ValueError,
        match=r"^K-FADE \(K-FAC\) takes all eigenvectors .* factorize .* leave the method out$",
    ):
        editor(every, STRENGTH.point(every), 0)
    assert not said


@pytest.mark.parametrize("row", [KFAC, NPO], ids=lambda row: row.name)
def test_a_run_beyond_the_finite_numbers_is_a_destroyed_model(row, task, monkeypatch):
    def lost(*_, **__):
        raise FloatingPointError("step 1: the objective, nan, is not finite")

    def refused(*_, **__):
        raise ValueError("the gradient of forget is zero")

    editor = Editor(task[0], OF_TEXTS, say=lambda _: None)
    names = ("run_method", "unlearn")
    for name in names:
        monkeypatch.setattr(editing, name, lost)
    params = editor(row, STRENGTH.point(row), 0)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(params))
    for name in names:
        monkeypatch.setattr(editing, name, refused)
    with pytest.raises(ValueError, match=f"^{re.escape(row.name)}: .* is zero; run the others wit"):
        editor(row, STRENGTH.point(row), 0)


def test_a_budget_is_kept_on_rows_from_all_over(task):
    task, retain = task
    (probed,) = (np.concatenate([b.inputs for b in part]) for part in searched(task)[1:])
    places = np.linspace(0, NUM_RETAIN - 1, PROBE).round().astype(int)
    np.testing.assert_array_equal(probed, retain.inputs[places])
    # All rows are there, each once.
    both = (sorted(np.asarray(x).tolist()) for x in (task.retain.inputs, retain.inputs))
    assert next(both) == next(both)
