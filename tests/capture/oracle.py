"""The oracle of capture: contracting what was captured equals `jax.grad`, by another way."""

import jax
import jax.numpy as jnp
import numpy as np

import jedit.capture as jc
from jedit.capture.discover import parameter_paths


def check_capture(apply, params, inputs, *, uncovered=(), kinds=None, tol=1e-10, select=None, seed=0):
    """Check every covered parameter of a program; returns its sites.

    Args:
        apply: the program.
        params: its parameters.
        inputs: its inputs.
        uncovered: the paths that must be the uncovered ones.
        kinds: a mapping from path to the set of kinds its sites must have.
        tol: relative tolerance.
        select: passed on.
        seed: of the random cotangent.
    """
    sites = jc.find_sites(apply, params, inputs, select)
    assert set(sites.uncovered) == set(uncovered), str(sites)

    @jax.jit
    def ours(params, inputs, cotangent):
        outputs, activations, pullback = jc.capture(apply, params, inputs, select)
        return outputs, jc.weight_gradients(sites, activations, pullback(cotangent))

    plain = apply(params, inputs)
    rng = np.random.default_rng(seed)
    cotangent = jnp.asarray(rng.normal(size=plain.shape), plain.dtype)
    outputs, gradients = ours(params, inputs, cotangent)
    np.testing.assert_allclose(outputs, plain, rtol=tol, atol=tol)
    expected = jax.grad(lambda p: jnp.vdot(apply(p, inputs), cotangent))(params)
    expected = dict(parameter_paths(expected))
    assert set(gradients) == set(sites.covered)
    for path, gradient in gradients.items():
        scale = float(jnp.max(jnp.abs(expected[path]))) + 1e-30
        np.testing.assert_allclose(
            np.asarray(gradient) / scale, np.asarray(expected[path]) / scale, atol=tol,
            err_msg=f"{path}\n{sites}",
        )
    for path, expected_kinds in (kinds or {}).items():
        found = {s.kind for s in sites.values() if path in s.weight.paths}
        assert found == set(expected_kinds), f"{path}: {found}\n{sites}"
    return sites
