"""Two parameters of one path: whatever is keyed by paths refuses them, in the same words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.checkpoint import params_hash
from jedit.core.batch import Batch
from jedit.core.paths import parameter_paths
from jedit.curvature import diagonal, estimate, quadratic_form, solve
from jedit.curvature.likelihoods import Categorical
from jedit.edits import Edit, apply_edit, edit_between
from jedit.models import with_lora
from jedit.tracing import capture, find_sites
from jedit.training import TrainingMethod, unlearn

TWICE = {"a": {"b": np.ones((4, 3), np.float32)}, "a/b": np.full((3, 2), 2, np.float32)}
X = np.ones((2, 4), np.float32)


def apply(params, x):
    return x @ params["a"]["b"] @ params["a/b" if "a/b" in params else "c"]


@functools.cache
def curvature():
    return estimated({"a": TWICE["a"], "c": TWICE["a/b"]})


def estimated(params):
    key = jax.random.key(0)
    return estimate(diagonal(apply, Categorical()), params, [Batch(jnp.asarray(X))], key=key)


def trained(params):
    def objective(apply, params, rows, retain, reference):
        del retain, reference
        return apply(params, rows.inputs).sum(), {}

    key, rows = jax.random.key(0), Batch(X)
    method = TrainingMethod(objective, optax.sgd(0.1))
    return unlearn(method, apply, params, rows, steps=1, key=key)


READERS = {
    "find_sites": lambda p: find_sites(apply, p, X),
    "capture": lambda p: capture(apply, p, X),
    "estimate": estimated,
    "solve": lambda p: solve(curvature(), p, damping=0.1),
    "quadratic_form": lambda p: quadratic_form(curvature(), p),
    "edit_between": lambda p: edit_between(p, p),
    "apply_edit": lambda p: apply_edit(p, Edit({"a/b": jnp.zeros((4, 3))})),
    "with_lora": lambda p: with_lora(apply, p, X, rank=1, key=jax.random.key(0)),
    "unlearn": trained,
    "params_hash": params_hash,
}


@pytest.mark.parametrize("reader", READERS)
def test_two_parameters_of_one_path(reader):
    with pytest.raises(ValueError, match=r"several parameters share one path: \['a/b'\]; rename"):
        READERS[reader](TWICE)


def test_paths_in_flattening_order():
    params = {"b": [1.0, 2.0], "a": {"c/d": 3.0}}
    assert parameter_paths(params) == [("a/c/d", 3.0), ("b/0", 1.0), ("b/1", 2.0)]


def test_adapters_that_would_stand_in_one_another():
    def apply(params, x):
        return x @ params["a"] @ params["a/b"]

    params = {"a": TWICE["a"]["b"], "a/b": TWICE["a/b"]}
    with pytest.raises(ValueError, match="adapters of 'a/b' would stand inside those of 'a'"):
        with_lora(apply, params, X, rank=1, key=jax.random.key(0))
