"""Outputs of sites computed anew, against functions written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.tracing import rewrite_outputs


def test_one_of_the_weights_that_a_scan_stacks_is_rewritten_alone(tolerance):
    """In the other weight's iterations nothing happens, whatever the function does to zeros."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(3, 3))) for name in ("first", "second")}
    x = jnp.asarray(rng.normal(size=(4, 3)))

    def apply(params, x):
        stack = jnp.stack([params["first"], params["second"]])
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]

    def change(site, leaves):
        assert leaves["second"].shape == (3, 3)
        return lambda y, given: jnp.exp(y) + given, site.laid_out(jnp.asarray([[1.0, 2.0, 3.0]]))

    found = rewrite_outputs(apply, params, x, {"second": change})
    y = jnp.tanh(x @ params["first"]) @ params["second"]
    expected = jnp.exp(y) + jnp.asarray([[1.0, 2.0, 3.0]])
    tolerance.check(found.outputs, jnp.tanh(expected))
    tolerance.check(found.site_outputs["second"][0], expected)


def test_a_parameter_without_a_site_is_named_with_its_reason():
    def apply(params, x):
        return x / params["w"][None]

    with pytest.raises(ValueError, match="'w' has no site: it divides, or is divided by"):
        rewrite_outputs(apply, {"w": jnp.ones(3)}, jnp.ones((2, 3)), {"w": lambda *_: None})
