"""Random labels: learn something else in place of what is to be forgotten.

    loss = γ NLL_f(y') + α R,      y' != y drawn once for every forget output

The labels are data, so they are drawn by `relabel` before the loop, and not anew at each step.
γ = 1 and α = 1 are arbitrary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jedit.core.batch import Batch
from jedit.core.checks import NOT_NEGATIVE, Range, check_numbers
from jedit.core.outputs import check_contents
from jedit.objectives.retain import add_retain, retain_nll
from jedit.objectives.token_nll import Apply, counted_nll, masked_mean


def relabel(batch: Batch, num_classes: int, *, key: Key[Array, ""]) -> Batch:
    """Return the batch with every target replaced by another class, uniformly.

    Raises:
        ValueError: the batch has no targets, or there is no other class.
    """
    check_numbers(Range(2, is_whole=True), num_classes=num_classes)
    if batch.targets is None:
        raise ValueError("relabel needs targets, got a batch without")
    check_contents(batch, "the batch", limits=(0, num_classes - 1), must_count=False)
    shift = jax.random.randint(key, batch.targets.shape, 1, num_classes, jnp.int32)
    old = jnp.maximum(batch.targets.astype(jnp.int32), 0)  # what does not count may hold anything
    new = jnp.mod(old + shift, num_classes)
    return batch._replace(targets=new.astype(batch.targets.dtype))


def random_label(
    params: PyTree,
    forget: Batch,
    retain: Batch | None = None,
    *,
    apply: Apply,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
    reference_params: PyTree | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the mean NLL of the relabelled forget batch, and the retain term when there is one."""
    check_numbers(NOT_NEGATIVE, gamma=gamma, alpha=alpha)
    relabelled_nll = masked_mean(*counted_nll(params, forget, apply=apply))
    aux = {"relabelled_nll": relabelled_nll}
    retain_term = (params, forget, retain, apply, reference_params, alpha, retain_objective)
    return add_retain(gamma * relabelled_nll, aux, *retain_term)
