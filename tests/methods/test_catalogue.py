"""The catalogue: every row runs on what it says it needs, and on no less."""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit import methods
from jedit.core.batch import Batch
from jedit.curvature import Factorize, ekfac, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import Edit, apply_edit
from jedit.methods import CATALOGUE, ByBudget, ByDraws, BySteps, Material, Need, _making
from jedit.methods.rows import closed_forms, objectives, steps
from jedit.objectives import NPO, Dialogue, Played, with_retain
from jedit.training import TrainingMethod, run_method
from tests.test_contract import ESTIMATOR, FeatureAttention, make_latents, make_scene, network

# Public methods that make no model forget: parts of others, looked for by name.
PARTS = {
    "causal_trace",
    "distinct_requests",
    "gradient_importance",
    "influential_layers",
    "module_effects",
    "repselect_moments",
    "target_values",
    *("causal_trace", "fit_autoencoder", "fit_latents", "important_tokens", "target_values"),
    "token_importance",
    # Those learn on, and forget nothing.
    *("filter_rollouts", "gere", "k_fpf", "module_sensitivity", "rft", "sensitive_modules"),
    *("activation_intervals", "anchored", "ogd", "refresh_learning", "stored_gradients"),
}


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def scene():
    """A small classifier with everything that any method needs, and its retain rows."""
    key = jax.random.key(0)
    _, params, curvature, forget, retain = make_scene(key)
    corrected = ekfac(network, Categorical(), curvature)
    material = Material(
        network,
        params,
        forget,
        curvature=curvature,
        corrected=estimate(corrected, params, [retain], key=key),
        target_moments=estimate(ESTIMATOR, params, [forget], key=key),
        rest_moments=curvature,
        hidden_site="v",
        layers=("w",),
        refusals=forget._replace(targets=(jnp.asarray(forget.targets) + 1) % 3),
        alternates=forget._replace(targets=(jnp.asarray(forget.targets) + 2) % 3),
        num_classes=3,
        retain=retain,
        dialogue=Dialogue(forget, retain, Play(forget, retain), 1e-2, 1e-2),
        steps=4,
        attention=FeatureAttention(),
        latents=make_latents(params, forget, retain),
        has_positions=False,
    )
    return material, retain


class Play(NamedTuple):
    """Labels drawn from the network: right ones are wanted of the retain rows alone."""

    forget: Batch
    retain: Batch

    def __call__(self, params, *, key):
        rows = jax.tree.map(lambda *x: jnp.repeat(jnp.concatenate(x), 4, axis=0), *self)
        drawn = jax.random.categorical(key, network(params, rows.inputs))
        is_right = np.asarray(drawn == rows.targets).reshape(-1, 4)
        cut = len(self.forget.targets)
        rewards = np.concatenate([~is_right[:cut], is_right[cut:]]).astype(float)
        return Played(rows._replace(targets=drawn), rewards)


def ran(row, material, retain):
    """The edit of the method, run as any is."""
    # So small a scene has no direction that holds less than a hundredth, nor a hundred weights.
    coarse = {name: 0.4 for name in ("threshold", "share") if name in row.settings}
    method = row.of(material, **coarse)
    if isinstance(row, ByDraws):
        return method(network, material.params, steps=2, key=jax.random.key(1))[0]
    more = {}
    if isinstance(row, BySteps):
        more = {"steps": 4, "key": jax.random.key(1)}
    elif isinstance(row, ByBudget):
        made = method
        method = lambda *given, **rows: made(*given, budget=0.01, **rows)  # noqa: E731
    forget = row.forget_rows(material) if isinstance(row, BySteps) else material.forget
    return run_method(method, network, material.params, forget, retain, **more)[0]


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_row_runs_on_what_it_needs_and_says_what_is_missing(scene, name):
    material, retain = scene
    row = CATALOGUE[name]
    assert row.missing(material) == ()
    kept = {f.name: getattr(material, f.name) for f in dataclasses.fields(Material)}
    for need in Need:
        if need not in row.needs:
            kept[need.field] = None
    least = Material(**kept)
    before = jax.tree.map(np.array, material.params)
    edit = ran(row, least, retain)
    assert isinstance(edit, Edit)
    # What any method promises: the given params stay, and the same again is the same, to the bit.
    jax.tree.map(np.testing.assert_array_equal, material.params, before)
    jax.tree.map(np.testing.assert_array_equal, ran(row, least, retain), edit)
    edited = apply_edit(material.params, edit)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(edited))
    assert any(np.any(edited[n] != material.params[n]) for n in edited)
    for need in row.needs - {Need.SUBJECTS}:
        with pytest.raises(ValueError, match=rf"needs .*{need.field}= \({need.value}\)"):
            row.of(dataclasses.replace(least, **{need.field: None}))
    with pytest.raises(ValueError, match=r"has no setting nonsense"):
        row.of(least, nonsense=1)


CURVED = {Need.CURVATURE, Need.CORRECTED, Need.TARGET_MOMENTS, Need.REST_MOMENTS}


@pytest.mark.parametrize("how", [Factorize("cholesky"), Factorize(rank=2)], ids=["none", "some"])
@pytest.mark.parametrize("name", [n for n, row in CATALOGUE.items() if row.needs & CURVED])
def test_a_row_says_what_it_takes_of_its_factors(scene, name, how):
    """It runs on factors without eigenvectors, or with some, if and only if it says so."""
    material, retain = scene
    row, key = CATALOGUE[name], jax.random.key(0)
    estimator = kfac(network, Categorical(), fisher="exact", factorize=how)

    def run():
        made = {"rest_moments": estimate(estimator, material.params, [retain], key=key)}
        made["curvature"] = made["rest_moments"]
        made["target_moments"] = estimate(estimator, material.params, [material.forget], key=key)
        if Need.CORRECTED in row.needs:
            corrected = ekfac(network, Categorical(), made["curvature"])
            made["corrected"] = estimate(corrected, material.params, [retain], key=key)
        return ran(row, dataclasses.replace(material, **made), retain)

    if row.spectrum.allows(how):
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(run()))
    else:
        with pytest.raises(
            ValueError, match=r"has (no|the leading) eigenvectors|have no eigenvector"
        ):
            run()


def test_names_are_said_once_and_settings_are_read(scene):
    assert all(name == row.name for name, row in CATALOGUE.items())
    material, _ = scene
    npo = CATALOGUE["NPO"]
    assert npo.of(material).objective == npo.of(material).objective
    assert npo.of(material, beta=0.7).objective == with_retain(NPO(beta=0.7))


def test_every_public_method_has_a_row():
    made = (closed_forms, objectives, steps, _making)
    text = "".join(Path(module.__file__).read_text() for module in made)
    public = {name for name in methods.__all__ if name.islower()} - PARTS
    assert {name for name in public if not re.search(rf"\b{name}[(),]", text)} == set()


def test_a_method_can_be_exchanged_by_its_name(scene):
    material, retain = scene
    edits = [ran(CATALOGUE[name], material, retain) for name in ("K-FADE (K-FAC)", "NPO", "engram")]
    assert all(isinstance(edit, Edit) for edit in edits)
    assert isinstance(CATALOGUE["NPO"].of(material), TrainingMethod)
