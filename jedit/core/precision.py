"""In which precision sums are computed, and how squares are kept within it.

Matrices are multiplied with `HIGHEST`: by default a GPU rounds what enters a product to 10 bits.
A sum of squares leaves float32 for entries beyond 1e19 or below 1e-19, which gradients have. So
what is squared is brought to entries of about one first, by a power of two, which rounds nothing:

    x = 2ⁿ x',   n from `exponents`, x' from `shifted(x, -n)`
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

HIGHEST = jax.lax.Precision.HIGHEST


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype that sums over values of `dtype` accumulate in: float32, or float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def wide(x: Array) -> Array:
    """Return `x` in float32, or in its own dtype if that is wider."""
    return x.astype(wide_dtype(x.dtype))


def total(scalars: PyTree) -> Array:
    """Return the sum of a tree's leaves, which have one shape."""
    return functools.reduce(jnp.add, jax.tree.leaves(scalars))


def everywhere(scalars: PyTree) -> PyTree:
    """Return the tree with the sum of its leaves at every leaf."""
    whole = total(scalars)
    return jax.tree.map(lambda _: whole, scalars)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Return the tree in the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def exponents(tree: PyTree, *, by_leaf: bool = False) -> PyTree:
    """Return the even n with 2ⁿ near the largest magnitude, at every leaf.

    n is 0 where the largest magnitude is 0 or not finite.

    Args:
        tree: a pytree of real arrays.
        by_leaf: n is of the largest entry of each leaf, and not of the whole tree.

    Returns:
        Scalars, int32; 2ⁿ and 2⁻ⁿ are normal numbers of every leaf's dtype.
    """
    dtype = wide_dtype(jnp.result_type(*(x.dtype for x in jax.tree.leaves(tree))))
    largest = jax.tree.map(lambda x: jnp.max(jnp.abs(x), initial=0).astype(dtype), tree)
    if not by_leaf:
        whole = functools.reduce(jnp.maximum, jax.tree.leaves(largest))
        largest = jax.tree.map(lambda _: whole, largest)
    # 8 below the dtype's limit, so that 2ⁿ and 2⁻ⁿ are both normal numbers.
    most = min(jnp.finfo(x.dtype).maxexp for x in jax.tree.leaves(tree)) - 8

    def exponent(size: Array) -> Array:
        _, n = jnp.frexp(size)
        # Even, so that the square root of 2ⁿ is a power of two too, and rounds nothing.
        n = jnp.where((size > 0) & jnp.isfinite(size), n - n % 2, 0)
        return jnp.clip(n, -most, most).astype(jnp.int32)

    return jax.tree.map(exponent, largest)


def shifted(tree: PyTree, by: PyTree) -> PyTree:
    """Multiply each leaf by 2ⁿ, n what stands at its place in `by`, or what broadcasts."""

    def shift(x: Array, n: Array) -> Array:
        return x * jnp.ldexp(jnp.ones((), wide_dtype(x.dtype)), n).astype(x.dtype)

    return jax.tree.map(shift, tree, by)
