"""The promises of methods that train, and of objectives; and that every public name has a row.

An exception is written in the table, with its reason.
"""

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit import methods, objectives, transforms
from jedit.training.loop import unlearn
from tests.objectives.references import SEQ, apply, make_batch, make_params
from tests.test_contract import METHODS, TRANSFORMS, Row, make_scene, network


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """Optax mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def hidden(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


SGD = optax.sgd(0.05, momentum=0.9)


def _kuda(apply, curvature):
    return methods.kuda(apply, hidden, curvature, SGD, select="^w$", threshold=0.4)


TRAINERS = [
    Row("gu", lambda f, *_: methods.gu(f, partial(objectives.ga, apply=f), learning_rate=0.05)),
    Row("rosu", lambda f, *_: methods.rosu(f, SGD, radius=0.05)),
    Row("uam", lambda f, *_: methods.uam(f, SGD, radius=0.05)),
    Row("sam", lambda f, *_: methods.sam(f, SGD)),
    Row("kuda", lambda f, p, c, *_: _kuda(f, c)),  # noqa: ARG005
    Row("salun", lambda f, p, c, forget, _: methods.salun(f, SGD, p, forget)),  # noqa: ARG005
    Row("l1_sparse", lambda f, *_: methods.l1_sparse(f, SGD, strength=0.01, steps=3)),
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
    frozen = {}
    if row.name == "kuda":
        direction = objectives.random_direction(6, key=jax.random.key(1))
        frozen = {"reference_params": params, "direction": direction}

    def run(params, seed):
        return unlearn(
            method.objective,
            method.optimizer,
            params,
            forget,
            retain,
            steps=3,
            key=jax.random.key(seed),
            batch_size=4,
            trainable="^w$|^b$",
            update_args=method.update_args,
            objective_args=frozen,
        )[0]

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
    assert num_traces == traced, "it was traced again for the same shapes"


def states(params, tokens):
    return params["embed"][tokens]


def direction(params):
    return jnp.full(params["embed"].shape[1:], 3**-0.5, params["embed"].dtype)


def _like(name: str, **more) -> Callable:
    return lambda p, ref, f, r: getattr(objectives, name)(p, f, r, apply=apply, **more)  # noqa: ARG005


def _beside(name: str) -> Callable:
    return lambda p, ref, f, r: getattr(objectives, name)(
        p, f, r, apply=apply, reference_params=ref
    )


def _deviation(p, ref, f, r):
    more = {"hidden": states, "reference_params": ref, "direction": direction(p)}
    return objectives.representation_deviation(p, f, r, apply=apply, **more)


def _rmu(p, ref, f, r):
    more = {"reference_params": ref, "direction": direction(p)}
    return objectives.rmu(p, f, r, hidden=states, **more)


def _npo_from_nll(p, ref, f, r):
    reference_nll = objectives.sequence_nll(apply, ref, f)
    return objectives.npo_from_nll(p, f, r, apply=apply, reference_nll=reference_nll)


OBJECTIVES: dict[str, Callable] = {
    **{x: _like(x) for x in ("ce_u", "ga", "graddiff", "random_label", "retain_nll", "satimp")},
    **{x: _like(x) for x in ("simnpo", "wga")},
    **{x: _beside(x) for x in ("npo", "retain_kl", "undial")},
    "dpo": lambda p, ref, f, r: objectives.dpo(p, (f, r), r, apply=apply, reference_params=ref),
    "npo_from_nll": _npo_from_nll,
    "representation_deviation": _deviation,
    "rmu": _rmu,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_keeps_its_promises(name, tolerance):
    """One compiled program for all of them."""
    num_traces = 0

    @jax.jit
    def evaluate(params, reference, forget, retain):
        nonlocal num_traces
        num_traces += 1
        loss = lambda p: OBJECTIVES[name](p, reference, forget, retain)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    keys = jax.random.split(jax.random.key(5), 4)
    models = make_params(keys[0]), make_params(keys[1])
    sets = make_batch(keys[2]), make_batch(keys[3])
    found = (loss, aux), gradient = evaluate(*models, *sets)
    assert all(x.shape == () and np.isfinite(x) for x in (loss, *aux.values()))
    describe = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)  # noqa: E731
    assert describe(gradient) == describe(models[0])
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradient))
    # What does not count may hold anything.
    garbage = [make_batch(key, garbage=3) for key in keys[2:]]
    garbage = [b._replace(targets=jnp.where(b.targets < 0, 2, b.targets)) for b in garbage]
    jax.tree.map(np.testing.assert_array_equal, evaluate(*models, *garbage), found)
    # Nor does the order of the rows matter.
    order = np.array([3, 0, 4, 2, 1])
    turned = (jax.tree.map(lambda x: x[order], batch) for batch in sets)
    tolerance.check(evaluate(*models, *turned), found)
    assert num_traces == 1
    assert sets[0].inputs.shape[1] == SEQ


NO_ROW = {
    "balanced": "makes weights of a stack of edits",
    "causal_trace": "measures, and changes nothing",
    "interactions": "measures a stack of edits",
    "random_direction": "draws an objective's argument",
    "refresh_curvature": "changes a transform's state",
    "relabel": "makes data",
    "sequence_nll": "is what objectives are made of",
    "target_values": "makes what rome and memit write",
    "token_kl": "is what objectives are made of",
    "token_nll": "is what objectives are made of",
    "with_update_args": "gives another transform's arguments (test_training_loops)",
}


def test_every_public_function_has_a_row():
    rows = {row.name.split(" ")[0].rstrip(",") for row in (*METHODS, *TRANSFORMS, *TRAINERS)}
    rows |= set(OBJECTIVES)
    public = {
        name
        for room in (methods, objectives, transforms)
        for name in room.__all__
        if inspect.isfunction(getattr(room, name))
    }
    assert rows <= public
    assert public - rows == set(NO_ROW)
