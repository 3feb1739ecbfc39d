"""The promises of methods that train, and of objectives; and that every public name has a row.

An exception is written in the table, with its reason.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit import methods, objectives, requests, steering, transforms
from jedit.objectives import GA, NPO, RepresentationDeviation, with_retain
from jedit.tracing import Cosines
from jedit.training import TrainingMethod, run_method, unlearn
from tests.objectives.references import SEQ, WIDTH, apply, make_batch, make_params
from tests.test_contract import (
    METHODS,
    TRANSFORMS,
    FeatureAttention,
    Row,
    make_latents,
    make_scene,
    network,
)


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """Optax mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def hidden(apply, params, x):
    del apply
    return jnp.tanh(x @ params["w"] + params["b"][None])


SGD = optax.sgd(0.05, momentum=0.9)
DEVIATION = with_retain(RepresentationDeviation(hidden))


def _latents(_, params, __, forget, retain):
    return make_latents(params, forget, retain)


def _kuda(*scene):
    return methods.kuda(scene[2], DEVIATION, SGD, select="^w$", threshold=0.4)


def _mcu(*scene):
    return methods.mcu(scene[1], scene[2], SGD, site="w", rank=2)


def _fit(apply, params, _, forget, retain):
    """NPO stands in for FIT's objective, which wants graded rows (test_fit)."""
    del retain
    objective = with_retain(NPO())
    return methods.fit_unlearning(apply, params, forget, SGD, objective=objective)


TRAINERS = [
    Row("natural", lambda *scene: methods.natural(GA(), scene[2])),
    Row("reglu", lambda _, p, c, *sets: methods.reglu(p, c, c, SGD)),  # noqa: ARG005
    Row("cure", lambda f, p, _, *sets: methods.cure(methods.module_effects(f, p, *sets), SGD)),
    Row("gu", lambda *_: methods.gu(GA(), learning_rate=0.05)),
    Row("rosu", lambda *_: methods.rosu(SGD, radius=0.05)),
    Row("uam", lambda *_: methods.uam(SGD, radius=0.05)),
    Row("pdu", lambda *_: methods.pdu(SGD, tolerance=0.3, dual=2.0)),
    Row("repselect", lambda *scene: methods.repselect(scene[2], share=0.5)),
    Row("ssiuu", lambda *_: methods.ssiuu(SGD)),
    Row("ofmu", lambda *_: methods.ofmu(SGD, inner_steps=1)),
    Row("mcu", _mcu),
    Row("sam", lambda *_: methods.sam(SGD)),
    Row("fit_unlearning", _fit),
    Row("kuda", _kuda),
    Row("salun", lambda f, p, c, forget, _: methods.salun(f, p, forget, SGD)),  # noqa: ARG005
    Row("l1_sparse", lambda *_: methods.l1_sparse(SGD, strength=0.01, steps=3)),
    Row("sae_guided", lambda *scene: methods.sae_guided(hidden, _latents(*scene), SGD)),
    Row(
        "attention_shifting",
        lambda *_: methods.attention_shifting(SGD, maps=FeatureAttention(), share=0.5),
    ),
    Row("gere", lambda *_: methods.gere(hidden, SGD)),
    Row("k_fpf", lambda *_: methods.k_fpf(SGD, "^w$", every=1, tuning_steps=1)),
    Row("NPO by SGD", lambda *_: TrainingMethod(with_retain(NPO()), SGD)),
]


@pytest.mark.parametrize("row", TRAINERS, ids=lambda row: row.name)
def test_a_training_method_keeps_its_promises(row):
    """One compiled program for all of them."""
    _, params, curvature, forget, retain = make_scene(jax.random.key(0))
    before = jax.tree.map(np.array, params)
    num_traces = 0

    def counting(params, inputs):
        nonlocal num_traces
        num_traces += 1
        return network(params, inputs)

    method = row.make(counting, params, curvature, forget, retain)
    assert isinstance(method, TrainingMethod)
    method = method._replace(batch_size=4, trainable="^w$|^b$")

    def run(params, seed):
        given = (counting, params, forget, retain)
        return unlearn(method, *given, steps=3, key=jax.random.key(seed))[0]

    first = run(params, 2)
    traced = num_traces
    for path, p in params.items():
        assert (first[path].shape, first[path].dtype) == (p.shape, p.dtype)
        np.testing.assert_array_equal(p, before[path], err_msg="the given params were changed")
        assert np.all(np.isfinite(first[path]))
    assert not np.array_equal(first["w"], params["w"])
    np.testing.assert_array_equal(first["v"], params["v"], err_msg="not trained, and moved")
    jax.tree.map(np.testing.assert_array_equal, first, run(params, 2))
    other = run(jax.tree.map(lambda p: 1.5 * p, params), 3)
    assert not np.array_equal(other["w"], first["w"])
    # As an edit, of what is trained alone.
    sets = (forget, retain)
    edit, info = run_method(method, counting, params, *sets, steps=3, key=jax.random.key(2))
    assert set(edit.blocks) == {"w", "b"}
    assert info.history["loss"].shape == (3,)
    for path, change in edit.blocks.items():
        np.testing.assert_array_equal(change, first[path] - params[path])
    assert num_traces == traced, "it was traced again for the same shapes"


def states(apply, params, tokens):
    del apply
    return params["embed"][tokens]


def maps(apply, params, tokens):
    return jax.nn.softmax(states(apply, params, tokens), axis=-1)[None]


def bands_of(rows):
    """The rows with bands around nothing, out of which all states lie."""
    bands = jnp.zeros((*rows.inputs.shape, WIDTH), jnp.int8)
    low, high = (jnp.full((len(rows.inputs), WIDTH), x) for x in (-0.1, 0.1))
    return objectives.ReplayedStates(rows, bands, low, high)


def as_taken(name, forget, retain):
    """The sets as an objective takes them."""
    marks = jnp.arange(WIDTH)[None] % 2 == jnp.zeros(len(retain.inputs), int)[:, None]
    if name in ("GeRe", "RetainMargin"):
        return forget, bands_of(retain)
    if name == "RetainAttention":
        return forget, (retain, marks)
    if name == "SuppressAttention":
        return (forget, marks), retain
    return ROWS_OF.get(name, lambda forget, _: forget)(forget, retain), retain


LATENT_MEANS = objectives.LatentMeans(
    jax.nn.relu, jnp.ones(WIDTH), -jnp.ones(WIDTH), jnp.asarray(9.0)
)
OBJECTIVES = {
    "CEU": objectives.CEU(),
    "DPO": objectives.DPO(),
    "FIT": objectives.FIT(),
    "GA": objectives.GA(),
    "IHL": objectives.IHL(),
    "LearnNLL": objectives.LearnNLL(),
    "GRPO": objectives.GRPO(),
    "GeRe": objectives.GeRe(states),
    "LogitMargin": objectives.LogitMargin(),
    "NPO": objectives.NPO(),
    "RMU": objectives.RMU(states),
    "RandomLabel": objectives.RandomLabel(),
    "RepresentationDeviation": objectives.RepresentationDeviation(states),
    "RetainAttention": objectives.RetainAttention(maps),
    "RetainKL": objectives.RetainKL(),
    "RetainMargin": objectives.RetainMargin(states),
    "RetainNLL": objectives.RetainNLL(),
    "RetainStates": objectives.RetainStates(states),
    "SAEGuided": objectives.SAEGuided(states, LATENT_MEANS, tokens="counted"),
    "SatImp": objectives.SatImp(),
    "SimNPO": objectives.SimNPO(),
    "SuppressAttention": objectives.SuppressAttention(maps),
    "UER": objectives.UER(Cosines("out")),
    "UNDIAL": objectives.UNDIAL(),
    "ViewBatch": objectives.ViewBatch(objectives.LearnNLL()),
    "WGA": objectives.WGA(),
    "with_retain": objectives.with_retain(objectives.NPO(), objectives.RetainKL()),
}


def _drawn(rows, _):
    """What a model has drawn, with advantages that belong to the rows."""
    targets = jnp.where(rows.mask & rows.valid, rows.targets, 0).astype(float)
    likeness, nll = jnp.sum(targets, axis=1), 0.3 * targets
    return objectives.Answers(rows, nll, jnp.sin(likeness))


def _graded(rows, _):
    counted = rows.mask & rows.valid
    taught = jnp.where(counted, (rows.targets + 1) % 7, -100)
    return objectives.GradedRows(rows, taught, jnp.sum(counted, axis=1) % 3)


# What an objective takes as the forget set, where that is not the rows alone.
ROWS_OF = {
    "DPO": lambda forget, retain: (forget, retain),
    "FIT": _graded,
    "GRPO": _drawn,
    "ViewBatch": lambda forget, _: objectives.stack_views([forget, forget]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_keeps_its_promises(name, tolerance):
    """One compiled program for all of them, also for an equal value."""
    num_traces = 0

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(objective, params, reference, forget, retain):
        nonlocal num_traces
        num_traces += 1
        sets = as_taken(name, forget, retain)
        loss = lambda p: objective(apply, p, *sets, reference)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    objective = OBJECTIVES[name]
    equal = dataclasses.replace(objective)
    assert equal is not objective
    assert equal == objective
    assert hash(equal) == hash(objective)
    keys = jax.random.split(jax.random.key(5), 4)
    models = make_params(keys[0]), make_params(keys[1])
    sets = make_batch(keys[2]), make_batch(keys[3])
    found = (loss, aux), gradient = evaluate(objective, *models, *sets)
    assert all(x.shape == () and np.isfinite(x) for x in (loss, *aux.values()))
    describe = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)  # noqa: E731
    assert describe(gradient) == describe(models[0])
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradient))
    # What does not count may hold anything.
    garbage = [make_batch(key, garbage=3) for key in keys[2:]]
    garbage = [b._replace(targets=jnp.where(b.targets < 0, 2, b.targets)) for b in garbage]
    jax.tree.map(np.testing.assert_array_equal, evaluate(equal, *models, *garbage), found)
    # Nor does the order of the rows matter.
    order = np.array([3, 0, 4, 2, 1])
    turned = (jax.tree.map(lambda x: x[order], batch) for batch in sets)
    tolerance.check(evaluate(equal, *models, *turned), found)
    assert num_traces == 1
    assert sets[0].inputs.shape[1] == SEQ


IN_TURN = "needs more of a task before than its parameters (tests/methods/test_consolidation)"
NO_ROW = {
    "activation_intervals": "measures, and changes nothing",
    "anchored": "makes a curvature",
    "ogd": IN_TURN,
    "refresh_learning": IN_TURN,
    "stored_gradients": "measures, and changes nothing",
    "MinorPart": "is what objectives are made of",
    "Answers": "is what an objective takes",
    "Dialogue": "is what RULE is made of",
    "GradedRows": "is what an objective takes",
    "Played": "is what RULE is made of",
    "ReplayedStates": "is what an objective takes",
    "Views": "is what an objective takes",
    "filter_rollouts": "chooses rows",
    "module_sensitivity": "measures, and changes nothing",
    "replayed_states": "makes data",
    "rft": "draws answers between its steps, and is not to be traced (test_rft)",
    "sensitive_modules": "makes a name of modules",
    "stack_views": "makes data",
    "Importance": "is what an objective takes",
    "LatentMeans": "is what an objective is made of",
    "balanced": "makes weights of a stack of edits",
    "continual": "answers a stream of requests (tests/requests/test_stream)",
    "causal_trace": "measures, and changes nothing",
    "distinct_requests": "chooses rows",
    "falling": "makes a schedule",
    "graded_rows": "makes data",
    "gradient_importance": "measures, and changes nothing",
    "group_advantages": "is what objectives are made of",
    "influential_layers": "measures, and changes nothing",
    "rule": "draws answers between its steps, and is not to be traced (test_rule)",
    "fit_autoencoder": "measures, and changes nothing",
    "fit_latents": "measures, and changes nothing",
    "forget": "stops by itself, and is not to be traced (tests/requests/test_forget)",
    "important_tokens": "measures, and changes nothing",
    "interactions": "measures a stack of edits",
    "module_effects": "measures, and changes nothing",
    "random_direction": "is what objectives are made of",
    "refresh_curvature": "changes a transform's state",
    "relabel": "makes data",
    "relabel_among": "makes data",
    "repselect_moments": "makes a curvature (tests/methods/test_repselect)",
    "sequence_nll": "is what objectives are made of",
    "target_values": "makes what rome and memit write",
    "token_importance": "measures, and changes nothing",
    "token_kl": "is what objectives are made of",
    "token_nll": "is what objectives are made of",
    "unlearn_refitted": "runs another method, in parts (tests/methods/test_repselect)",
    "with_update_args": "gives another transform's arguments (test_training_loops)",
}


def test_every_public_function_has_a_row():
    rows = {row.name.split(" ")[0].rstrip(",") for row in (*METHODS, *TRANSFORMS, *TRAINERS)}
    rows |= set(OBJECTIVES)
    public = {
        name
        for room in (methods, objectives, requests, transforms)
        for name in room.__all__
        if inspect.isfunction(getattr(room, name))
        or (room is objectives and inspect.isclass(getattr(room, name)))
    }
    assert rows <= public | {steering.lineas.__name__}
    assert public - rows == set(NO_ROW)
