"""Leave out of an update its largest entries: u_i <- 0 where |u_i| is among the top fraction.

A few coordinates with outsized gradients carry most of the damage that ascent does; this is the
plainest of robust updates, and a baseline for the geometric ones. ignore-top-k (arXiv 2504.09522)
leaves them out of the whole change, once, after training [notes]: that is
`jedit.edits.without_top_fraction`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jedit.core.arguments import check_word
from jedit.core.checks import SHARE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.magnitudes import bound_below_top
from jedit.geometry.surrogate import Scope


def ignore_top_fraction(
    fraction: float, *, scope: Scope = "leaf"
) -> optax.GradientTransformationExtraArgs:
    """Set the largest entries of an update to zero.

    Stands last, so that what Adam or momentum makes of the rest stays left out too:

        optax.chain(optax.adam(1e-4), ignore_top_fraction(0.01))

    Args:
        fraction: share of the entries, 0 to 1, rounded to a whole number of them; entries equal to
            the smallest that is left out are kept.
        scope: "leaf", the share of every parameter (paper), or "global", of all entries together.

    Returns:
        The transform; it holds no state. A call sorts the entries' magnitudes.

    Raises:
        ValueError: the fraction is outside 0 to 1, or the scope is another word.
    """
    check_numbers(SHARE, fraction=fraction)
    check_word(Scope, scope=scope)

    bound = functools.partial(bound_below_top, fraction=fraction)

    @on_auto_axes
    def without_top(updates):
        sizes = jax.tree.map(lambda u: jnp.abs(u).astype(jnp.float32).ravel(), updates)
        if scope == "global":
            limit = bound(jnp.concatenate(jax.tree.leaves(sizes)))
            limits = jax.tree.map(lambda _: limit, sizes)
        else:
            limits = jax.tree.map(bound, sizes)
        return jax.tree.map(
            lambda u, limit: jnp.where(jnp.abs(u).astype(jnp.float32) <= limit, u, 0),
            updates,
            limits,
        )

    def update(updates, state, params=None, **extra_args) -> Any:
        del params, extra_args
        return without_top(updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
