"""What the Cholesky factor of a matrix in rows of blocks costs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jedit.curvature.mesh import blocked


def flops(jaxpr):
    """Those of all products, of loops as often as they run."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            found += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
        assert equation.primitive.name != "while"  # of which nobody knows how often it runs
        times = equation.params.get("length", 1)
        for inside in jaxprs_in_params(equation.params):
            found += times * flops(inside)
    return found


def test_cholesky_leaves_out_the_columns_that_are_done(monkeypatch, tolerance):
    monkeypatch.setattr(blocked, "LARGEST_BLOCK", 4)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, "data", None))
    d = 128
    x = np.random.default_rng(0).normal(size=(d, 2 * d))
    rows = blocked.cut(jnp.asarray(x @ x.T, float)[None], jnp.ones(1), place)
    jaxpr = jax.make_jaxpr(lambda rows: blocked.cholesky(rows, place))(rows)
    # 5/4 of the cube, and what the columns are divided by.
    assert flops(jaxpr.jaxpr) <= 1.35 * d**3
    found = blocked.joined(blocked.cholesky(rows, place), d)[0]
    expected = np.linalg.cholesky(x @ x.T + np.eye(d))
    off = np.arange(d)[:, None] // 4 > np.arange(d)[None] // 4
    tolerance.check(jnp.where(off, found, 0), np.where(off, expected, 0), "factorization")
