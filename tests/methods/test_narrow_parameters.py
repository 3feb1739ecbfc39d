"""bfloat16 parameters: an edit is what was wanted, and only `apply_edit` rounds it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, factors, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import Edit, apply_edit, cast_report
from jedit.geometry import null_space, scale_to_kl_budget
from jedit.methods import (
    Ascent,
    Associations,
    Layers,
    alphaedit,
    curvature_engram,
    engram,
    kfade,
    memit,
    rome,
)
from jedit.objectives import GA
from jedit.requests import Solver, batch_unlearn
from jedit.requests.stream import _raise_loss

DAMPING = 0.3


def network(params, x):
    """Narrow weights, products in float32 as on a device whose sums are wide."""
    w, b, v = (params[n].astype(x.dtype) for n in ("w", "b", "v"))
    return jnp.tanh(x @ w + b[None]) @ v


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(1)
    shapes = {"w": (4, 6), "b": (6,), "v": (6, 3)}
    params = {n: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(48, 4)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, 48))
    forget, retain = Batch(x[:8], y[:8]), Batch(x[8:], y[8:])
    estimator = kfac(network, Categorical(), select="^w$|^b$")
    return params, forget, retain, estimate(estimator, params, [retain], key=jax.random.key(0))


def _wanted(curvature, params, forget):
    """The direction in NumPy, float64; bfloat16 has rounded nothing but the gradient's entries."""
    gradient = jax.grad(lambda p: -GA()(network, p, forget)[0])(params)
    w, b = (np.asarray(gradient[n], np.float64) for n in ("w", "b"))
    (a, qa), (g, qg) = (np.linalg.eigh(np.asarray(m, np.float64)) for m in factors(curvature, "w"))
    products = np.outer(a, g)
    rotated = qa.T @ np.vstack([w, b]) @ qg / (products + DAMPING * products.mean())
    both = qa @ rotated @ qg.T
    return {"w": both[:-1], "b": both[-1]}


def _rounded(params, change):
    """The parameters with a float64 change, rounded once."""
    moved = {n: np.asarray(params[n], np.float64) + change[n] for n in change}
    return params | {n: jnp.asarray(x).astype(jnp.bfloat16) for n, x in moved.items()}


def test_kfade_sums_its_steps_and_rounds_once(scene):
    params, forget, retain, curvature = scene
    alpha = 4e-4  # a step is a fraction of a unit in the last place
    edit, info = kfade(
        network,
        params,
        curvature,
        forget,
        retain,
        damping=DAMPING,
        ascent=Ascent(3, step_size=alpha),
    )
    total = {"w": 0.0, "b": 0.0}
    for _ in range(3):
        current = _rounded(params, total) if np.any(total["b"]) else params
        step = _wanted(curvature, current, forget)
        total = {n: total[n] + alpha * step[n] for n in total}
    for path, block in edit.blocks.items():
        assert block.dtype == jnp.float32
        scale = np.abs(total[path]).max()
        np.testing.assert_allclose(np.asarray(block) / scale, total[path] / scale, atol=1e-4)
    edited = apply_edit(params, edit)
    for path, report in cast_report(params, edit).items():
        old, new = (np.asarray(p[path], np.float64) for p in (params, edited))
        lost = np.linalg.norm(total[path] - (new - old)) / np.linalg.norm(total[path])
        assert report.rounded_away == pytest.approx(lost, rel=1e-2)
        assert report.rounded_away > 0.1
    logits = [network(p, retain.inputs) for p in (params, edited)]
    true = float(jnp.mean(Categorical().kl(*logits)))
    assert info.true_kl[-1] == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize("budget", [1e-5, 1e-2])
def test_a_budget_is_kept_by_the_parameters_as_they_are_stored(scene, budget):
    params, forget, retain, curvature = scene

    def true_kl(edited):
        logits = [network(p, retain.inputs) for p in (params, edited)]
        return float(jnp.mean(Categorical().kl(*logits)))

    edit, info = kfade(
        network,
        params,
        curvature,
        forget,
        retain,
        budget=budget,
        damping=DAMPING,
        ascent=Ascent(1),
    )
    assert info.true_kl[0] == pytest.approx(true_kl(apply_edit(params, edit)), rel=1e-4)
    assert info.true_kl[0] <= budget * (1 + 1e-3)
    step = {path: block.astype(jnp.bfloat16) for path, block in edit.blocks.items()}
    scaled, found = scale_to_kl_budget(
        network, params, step, retain, budget=budget, likelihood=Categorical()
    )
    assert {d.dtype for d in scaled.values()} == {jnp.dtype(jnp.float32)}
    assert found.true_kl == pytest.approx(true_kl(apply_edit(params, Edit(scaled))), rel=1e-4)
    assert found.true_kl <= budget * (1 + 1e-3)


def test_every_method_makes_its_edit_wide(scene):
    params, forget, _, curvature = scene
    facts = Associations(forget)
    one = jax.tree.map(lambda leaf: leaf[None], forget)
    exact = functools.partial(batch_unlearn, network, params, curvature, one, damping=DAMPING)
    edits = {
        "engram": engram(params, curvature, curvature, scale=0.3),
        "curvature_engram": curvature_engram(params, curvature, curvature, scale=0.3),
        "rome": rome(network, params, curvature, facts, None, layer="w"),
        "memit": memit(
            network, params, curvature, facts, None, layers=Layers("w"), preservation=1.0
        ),
        "alphaedit": alphaedit(
            network, params, null_space(curvature, threshold=0.2), facts, None, layers=Layers("w")
        ),
        "batch_unlearn": jax.tree.map(lambda x: x[0], exact(solver=Solver(exact=True))),
        "batch_unlearn, thin": jax.tree.map(lambda x: x[0], exact()),
    }
    for name, (edit, _) in edits.items():
        assert {b.dtype for b in edit.blocks.values()} == {jnp.dtype(jnp.float32)}, name
        report = cast_report(params, 0.01 * edit)
        assert all(x.rounded_away > 0.01 for x in report.values()), (name, report)
    wanted = _wanted(curvature, params, forget)
    for path, block in edits["batch_unlearn"][0].blocks.items():
        scale = np.abs(wanted[path]).max()  # the reference has rounded gradients
        np.testing.assert_allclose(np.asarray(block) / scale, wanted[path] / scale, atol=2e-2)


def test_a_model_that_computes_in_bfloat16_is_batch_unlearned(scene):
    params, forget, _, curvature = scene
    one = jax.tree.map(lambda leaf: leaf[None], forget)
    narrow = one._replace(inputs=one.inputs.astype(jnp.bfloat16))
    for exact in (True, False):
        options = {"solver": Solver(exact=exact), "damping": DAMPING}
        wide_edit, _ = batch_unlearn(network, params, curvature, one, **options)
        edit, _ = batch_unlearn(network, params, curvature, narrow, **options)
        for path in ("w", "b"):
            x, y = (
                apply_edit({path: jnp.zeros(params[path].shape, jnp.float32)}, e)[path]
                for e in (_first(edit, path), _first(wide_edit, path))
            )
            x, y = np.ravel(x), np.ravel(y)
            assert x @ y > 0.999 * np.linalg.norm(x) * np.linalg.norm(y)


def _first(edits, path):
    return Edit({path: jax.tree.map(lambda x: x[0], edits.blocks[path])})


def test_a_continual_step_is_rounded_once_and_returns_what_moved(scene):
    params, forget, _, _ = scene
    block = 1e-2 * jnp.cos(params["w"].astype(jnp.float32))
    part, alpha, _ = _raise_loss(
        network, params, Edit({"w": block}), forget, jnp.float32(0.37), jnp.asarray(1e9)
    )
    assert set(part) == {"w"}
    expected = apply_edit(params, Edit({"w": block}), alpha)
    np.testing.assert_array_equal(part["w"], expected["w"])
