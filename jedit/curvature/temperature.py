"""At which temperature the outputs' Fisher matrix still sees something.

    tr(diag(p) - p pᵀ) = 1 - Σ_c p_c²,       p = softmax(z / T)

the trace, times T², of one output's Fisher matrix.  It is what K-FAC's factors are made of: where a
model has its rows by heart p is nearly one label, the trace nearly zero, and the metric protects
nothing.  Where it has not, tempering weighs outputs up that nobody will ever sample, and cost
utility on one trial (`tests/bench/claims/natural.md`).  So the lowest temperature is taken at which
the mean trace is `least`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import batch_list, check_function, check_params
from jedit.core.batch import Batch
from jedit.core.checks import POSITIVE, POSITIVE_SHARE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.core.row_blocks import in_row_blocks

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)  # 4 and 8 did alike on a memorised model, so it ends there


@on_auto_axes
def choose_temperature(
    apply: Callable,
    params: PyTree,
    batches: Batch | Sequence[Batch],
    *,
    least: float = 0.1,
    among: Sequence[float] = TEMPERATURES,
) -> float:
    """Choose the temperature of `Categorical` by how saturated a model is on the retain rows.

        estimator = kfac(apply, Categorical(choose_temperature(apply, params, retain)))

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the trained parameters.
        batches: retain rows, one batch or several; a few hundred outputs are enough.
        least: the mean of 1 - Σ p² over the counted outputs that is enough; 0.1 is ours: a GPT at a
            loss of 0.4 nats has 0.2 to 0.3 at temperature 1, one at 0.02 has 0.01.
        among: the temperatures to choose from.

    Returns:
        The lowest of them that has enough; the highest if none has.

    Raises:
        ValueError: a number out of its range, or the batches count no output.
    """
    check_numbers(POSITIVE_SHARE, least=least)
    check_numbers(POSITIVE, among=among)
    check_function(apply)
    check_params(params)
    batches = batch_list(batches, "batches")
    tried = sorted(among)
    if not tried:
        raise ValueError("among holds no temperature to choose from")
    found = [_traces(apply, params, batch, tuple(tried)) for batch in batches]
    *traces, number = np.sum(np.asarray(found, np.float64), axis=0).tolist()
    if not number:
        raise ValueError(f"the {len(batches)} batches count no output: no temperature is told")
    enough = [t for t, value in zip(tried, traces, strict=True) if value / number >= least]
    return enough[0] if enough else tried[-1]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _traces(
    apply: Callable, params: PyTree, batch: Batch, temperatures: tuple[float, ...]
) -> Float[Array, " sums"]:
    """Return the sum of the counted outputs' traces at each temperature, and their number."""

    def values(outputs: tuple[Array, ...], rows: Batch) -> Array:
        logits = wide(outputs[0])
        counted = counted_outputs(rows, logits.shape[:-1])

        def trace(temperature: float) -> Array:
            p = jax.nn.softmax(logits / temperature, axis=-1)
            return jnp.where(counted, 1 - jnp.sum(p * p, axis=-1), 0)

        number = counted.astype(logits.dtype)
        return jnp.stack([*(trace(t) for t in temperatures), number], axis=-1)

    found = in_row_blocks(values, apply, (params,), batch)
    return jnp.sum(found, axis=tuple(range(found.ndim - 1)))
