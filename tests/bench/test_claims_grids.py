"""The scripts of the grids and of persistence: the rule, and bands that add up to the whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac, quadratic_form
from jedit.curvature.likelihoods import Categorical
from tests.bench.claims import grids, persistence


def point(quality, utility):
    return {"quality": quality, "utility": utility}


def test_the_rule_is_the_recipes():
    lost, faint, kept = point(0.9, 0.5), point(0.01, 0.7), point(0.04, 0.62)
    # Nothing passes among those that keep four fifths: the greatest quality.
    assert grids.best_of([lost, faint, kept], 0.75, grids.SHARE) is kept
    passing, better = point(0.9, 0.61), point(0.06, 0.65)
    # From the limit on, utility decides.
    assert grids.best_of([lost, faint, kept, passing, better], 0.75, grids.SHARE) is better
    assert grids.best_of([lost], 0.75, grids.SHARE) is lost


def test_every_method_has_as_many_points():
    for tried in grids.METHODS.values():
        assert len(set(tried.settings)) * len(set(tried.rates)) * len(grids.LOOKS) == 27


def test_bands_are_a_partition_of_the_eigenbasis(key):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 4))), "bias": jnp.zeros(4)}
    rows = Batch(jnp.asarray(rng.normal(size=(40, 6))), jnp.asarray(rng.integers(0, 4, 40)))

    def apply(params, inputs):
        return inputs @ params["kernel"] + params["bias"][None]

    curvature = estimate(kfac(apply, Categorical()), params, [rows], key=key)
    bands = persistence.Bands(curvature)
    sizes = [sum(mask.sum() for mask in bands.masks[band].values()) for band in persistence.BANDS]
    assert sum(sizes) == 28
    assert sizes[0] < sizes[1] <= sizes[2]
    change = {
        "kernel": jnp.asarray(rng.normal(size=(6, 4))),
        "bias": jnp.asarray(rng.normal(size=4)),
    }
    found = bands.coordinates(change)
    parts = [bands.part(found, band) for band in persistence.BANDS]
    for path, whole in change.items():
        np.testing.assert_allclose(sum(part[path] for part in parts), whole, atol=1e-6)
    squared = sum(float(np.sum(np.square(x))) for x in change.values())
    assert sum(bands.dot(found, found, b) for b in persistence.BANDS) == pytest.approx(squared)
    priced = sum(bands.dot(found, found, b, priced=True) for b in persistence.BANDS)
    assert priced == pytest.approx(float(quadratic_form(curvature, change)), rel=1e-5)


def test_a_table_has_a_row_a_method_and_takes_medians(capsys):
    numbers = dict.fromkeys((*grids.COLUMNS.values(), "model_utility"), 0.5)
    numbers |= {f"mia_{name}": 0.5 for name in ("loss", "zlib", "min_k", "min_k_plus_plus")}
    for name in ("privacy_score", "overall_score"):
        del numbers[name]
    records = [
        {"kind": "report", "protocol": "field", "method": method, "seed": seed}
        | numbers
        | {"forget_quality": quality}
        for seed, quality in enumerate((0.01, 0.2, 0.9))
        for method in (grids.UNTOUCHED, "retrained", "NPO")
    ]
    summary = grids.table([*records, {"kind": "grid"}], "field")
    assert summary["NPO"]["passes"] == 2
    assert summary["NPO"]["median quality"] == 0.2
    assert summary["NPO"]["utility"]["values"] == [0.5, 0.5, 0.5]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| untouched", "| retrained", "| NPO"]
