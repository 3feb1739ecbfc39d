"""The oracle of capture: contracting what was captured equals `jax.grad`, by another way."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from jedit.core.paths import parameter_paths
from jedit.tracing import capture, find_sites, weight_gradients

# Sums over a batch in another order: 1e-10 in float64, and what float32 allows.
TOLERANCE = 1e-10 if jax.config.jax_enable_x64 else 5e-5
# Small programs run once: compiling them well costs more than running them badly.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@contextlib.contextmanager
def user_rules():
    """JAX's rules as users have them; the tests' own are stricter."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def as_users_write(apply):
    """The program under users' rules."""

    def run(params, inputs):
        with user_rules():
            return apply(params, inputs)

    return run


def normal(*shape, seed=0, dtype=None):
    """Draws of a size that keeps activations of order one."""
    draws = np.random.default_rng([seed, *shape]).normal(size=shape)
    scale = np.sqrt(max(shape[0], 1) if shape else 1)
    return np.asarray(draws / scale, dtype or jnp.result_type(float))


def filled(params, seed=0):
    """Parameters of these shapes, no bias zero and no gain one, in the run's own float."""
    leaves, structure = jax.tree.flatten(params)
    drawn = [normal(*x.shape, seed=seed + i) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def check_capture(
    apply, params, inputs, *, uncovered=(), kinds=None, tol=None, select=None, seed=0, fast=True
):
    """Check every covered parameter of a program; returns its sites.

    Args:
        apply: the program.
        params: its parameters.
        inputs: its inputs.
        uncovered: the paths that must be the uncovered ones; None leaves that open.
        kinds: a mapping from path to the set of kinds its sites must have.
        tol: tolerance relative to a parameter's largest gradient entry.
        select: passed on.
        seed: of the random cotangent.
        fast: whether to compile with few optimizations.
    """
    tol = TOLERANCE if tol is None else tol
    apply = as_users_write(apply)
    sites = find_sites(apply, params, inputs, select)
    assert uncovered is None or set(sites.uncovered) == set(uncovered), str(sites)
    for path, expected_kinds in (kinds or {}).items():
        found = {s.kind for s in sites.values() if path in s.weight.paths}
        assert found == set(expected_kinds), f"{path}: {found}\n{sites}"

    def both(params, inputs, cotangent):
        outputs, activations, pullback = capture(apply, params, inputs, select)
        ours = weight_gradients(sites, activations, pullback(cotangent))
        plain, vjp = jax.vjp(lambda p: apply(p, inputs), params)
        return outputs, ours, plain, dict(parameter_paths(vjp(cotangent)[0]))

    shape = jax.eval_shape(apply, params, inputs)
    cotangent = np.random.default_rng(seed).normal(size=shape.shape)
    arguments = (params, inputs, jnp.asarray(cotangent, shape.dtype))
    lowered = jax.jit(both).lower(*arguments)
    compiled = lowered.compile(compiler_options=FAST_COMPILE if fast else None)
    outputs, ours, plain, expected = compiled(*arguments)
    assert_close(outputs, plain, tol, "outputs")
    assert set(ours) == set(sites.covered)
    for path, gradient in ours.items():
        assert_close(gradient, expected[path], tol, f"{path}\n{sites}")
    return sites


def assert_close(actual, expected, tol, message=""):
    """Agreement relative to the largest expected entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{message}: {actual.shape} != {expected.shape}"
    scale = np.max(np.abs(expected), initial=0.0) or 1.0
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tol, err_msg=message)
