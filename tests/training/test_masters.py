"""Masters: what is computed is what the rounded weights compute, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np

import jedit
from jedit.training.masters import with_masters


def apply(params, x):
    return x @ params["w"].astype(x.dtype) + params["b"].astype(x.dtype)[None]


def test_the_trained_alone_are_widened_and_rounded_where_they_are_used():
    draw = np.random.default_rng(0)
    params = {"b": draw.normal(size=3), "w": draw.normal(size=(4, 3))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    x = jnp.asarray(draw.normal(size=(5, 4)), jnp.float32)
    function, masters = with_masters(apply, params, (False, True))
    assert masters["b"].dtype == jnp.bfloat16
    assert masters["w"].dtype == jnp.float32
    moved = {**masters, "w": masters["w"] * (1 + 2.0**-7)}
    for given in (masters, moved):
        rounded = jax.tree.map(lambda y: y.astype(jnp.bfloat16), given)
        np.testing.assert_array_equal(function(given, x), apply(rounded, x))
    assert not np.array_equal(function(moved, x), apply(params, x))
    # Equal functions are one to JAX, so that a second call compiles nothing.
    again, _ = with_masters(apply, params, (False, True))
    assert (again, hash(again)) == (function, hash(function))
    assert again != with_masters(apply, params | {"b": x[0, :3]}, (False, True))[0]
    assert {site.kind for site in jedit.find_sites(function, masters, x).values()} == {"dense"}
    wide = jax.tree.map(lambda y: y.astype(jnp.float32), params)
    assert with_masters(apply, wide, (True, True)) == (apply, wide)
