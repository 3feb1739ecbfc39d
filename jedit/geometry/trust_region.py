"""Trust regions: how far a step may go before the retain outputs have moved by a stated KL.

    KL(θ₀ ‖ θ₀ + α d) ≈ ½ α² dᵀF d <= ε      =>      α = sqrt(2 ε / dᵀF d)

and then the truth: a few evaluations of the KL itself, by bracketing and false position. On a
memorised model the quadratic is wrong by orders of magnitude; hence both numbers are returned.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.arguments import batch_list, check_function, check_params, refuse_tracers
from jedit.curvature import Curvature, quadratic_form, quadratic_kl
from jedit.curvature.likelihoods import Likelihood, check_likelihood
from jedit.outputs import counted_outputs, wide
from jedit.typing import Batch

MAX_SCALE = 1e6  # of a step that seems to cost nothing; arbitrary
MAX_EVALUATIONS = 12  # of the retain KL in one line search; arbitrary, 5 to 8 are the rule


class TrustRegionInfo(NamedTuple):
    """What a scaled step was predicted to cost and does cost; nats per counted output.

    Attributes:
        scale: α.
        predicted_kl: ½ α² dᵀG d, by the matrix-free Gauss-Newton matrix of the retain outputs.
        true_kl: KL(θ₀ ‖ θ₀ + α d) on the retain rows.
    """

    scale: float
    predicted_kl: float
    true_kl: float


def scale_to_kl_budget(
    apply: Callable,
    likelihood: Likelihood,
    params: PyTree,
    step: PyTree,
    retain: Batch | Sequence[Batch],
    *,
    budget: float,
    curvature: Curvature | None = None,
) -> tuple[PyTree, TrustRegionInfo]:
    """Scale a step so that the true retain KL is `budget`, to one percent, and never above.

    Not to be traced: the number of evaluations depends on what they say.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        likelihood: what the outputs mean.
        params: θ₀.
        step: d, a change of params, of any length but zero.
        retain: rows on which the KL is measured, one batch or several.
        budget: ε, nats per counted output.
        curvature: gives the first guess; None: the matrix-free Gauss-Newton product does.

    Returns:
        α d, and what was found; α is at most 1e6, for steps that cost nothing at any length.

    Raises:
        ValueError: a budget that is not positive, or retain batches that count no output.
    """
    if budget <= 0:
        raise ValueError(f"budget must be positive, got {budget}")
    price = RetainKl(apply, likelihood, params, retain)
    if curvature is None:
        quadratic = price.predicted(step)
    else:
        quadratic = 0.5 * float(quadratic_form(curvature, step))
    start = math.sqrt(budget / max(quadratic, budget * 1e-12))
    start = min(start, MAX_SCALE)
    scale = largest_step_within(
        lambda alpha: price(params, step, alpha), start, budget, limit=MAX_SCALE
    )
    scaled = jax.tree.map(lambda d: d * jnp.asarray(scale, d.dtype), step)
    true_kl = price(params, scaled, 1.0)
    return scaled, TrustRegionInfo(scale, price.predicted(scaled), true_kl)


class RetainKl:
    """The price of a change: KL(θ₀ ‖ θ) on the retain batches. θ₀'s outputs are computed once.

    Attributes:
        batches: the retain batches.
    """

    def __init__(
        self,
        apply: Callable,
        likelihood: Likelihood,
        params: PyTree,
        retain: Batch | Sequence[Batch],
    ):
        """Compute θ₀'s outputs.

        Args:
            apply: `apply(params, inputs) -> outputs`.
            likelihood: what they mean.
            params: θ₀.
            retain: one batch, or several.

        Raises:
            TypeError: an argument that is something else.
            ValueError: they count no output, there are none, or something is traced.
        """
        check_function(apply)
        check_likelihood(likelihood)
        check_params(params)
        self.batches = batch_list(retain, "retain")
        refuse_tracers("a retain KL", (params, self.batches), "measure it outside")
        self._apply, self._likelihood, self._params = apply, likelihood, params
        self._base = [_outputs(apply, params, batch) for batch in self.batches]
        self._counts = [num_counted(apply, likelihood, params, batch) for batch in self.batches]
        if not sum(self._counts):
            raise ValueError(
                f"the {len(self.batches)} retain batches count no output, so no KL can be measured"
            )

    def __call__(self, start: PyTree, move: PyTree, alpha: float) -> float:
        """True KL at start + alpha·move, nats per counted output."""
        pairs = zip(self._base, self.batches, strict=True)
        return self._mean(
            _moved_kl(self._apply, self._likelihood, start, move, alpha, base, batch)
            for base, batch in pairs
        )

    def predicted(self, change: PyTree) -> float:
        """Second-order KL of a change from θ₀."""
        change = jax.tree.map(lambda d, p: d.astype(p.dtype), change, self._params)
        return self._mean(
            _predicted_kl(self._apply, self._likelihood, self._params, batch, change)
            for batch in self.batches
        )

    def _mean(self, values) -> float:
        weighted = (float(v) * n for v, n in zip(values, self._counts, strict=True) if n)
        return sum(weighted) / sum(self._counts)


def num_counted(apply: Callable, likelihood: Likelihood, params: PyTree, batch: Batch) -> int:
    """How many outputs a batch counts."""

    def leading(params, inputs):
        return jnp.zeros(likelihood.lead_shape(apply(params, inputs)), bool)

    lead = jax.eval_shape(leading, params, batch.inputs).shape
    return int(jnp.sum(counted_outputs(batch, lead)))


@jax.jit
def moved(params: PyTree, move: PyTree, alpha: float | Array) -> PyTree:
    """Return params + alpha·move, in the params' own dtypes."""
    return jax.tree.map(
        lambda p, d: (wide(p) + jnp.asarray(alpha, wide(p).dtype) * d.astype(wide(p).dtype)).astype(
            p.dtype
        ),
        params,
        move,
    )


@functools.partial(jax.jit, static_argnames="apply")
def _outputs(apply, params, batch):
    return apply(params, batch.inputs)


@functools.partial(jax.jit, static_argnames=("apply", "likelihood"))
def _moved_kl(apply, likelihood, params, move, alpha, base, batch):
    """Mean KL of the original outputs from those at params + alpha·move, over counted outputs."""
    outputs = apply(moved(params, move, alpha), batch.inputs)
    counted = counted_outputs(batch, likelihood.lead_shape(outputs))
    kl = jnp.where(counted, likelihood.kl(base, outputs), 0)
    return jnp.sum(kl) / jnp.maximum(jnp.sum(counted), 1).astype(kl.dtype)


_predicted_kl = jax.jit(quadratic_kl, static_argnames=("apply", "likelihood"))


def largest_step_within(
    kl_at: Callable[[float], float], start: float, allowed: float, *, limit: float = math.inf
) -> float:
    """The largest α <= limit with KL(α) <= allowed, to one percent: bracket, then interpolate.

    sqrt(KL), which is nearly linear in α where the quadratic model holds, is followed by false
    position in a bracket; a value that is not finite counts as too large. What is returned was
    evaluated and is within.
    """
    inside, low = 0.0, math.sqrt(max(kl_at(0.0), 0.0))
    outside, high = math.inf, math.inf
    target = math.sqrt(allowed)
    alpha = start
    for _ in range(MAX_EVALUATIONS):
        value = kl_at(alpha)
        root = math.sqrt(max(value, 0.0)) if math.isfinite(value) else math.inf
        if root <= target:
            inside, low = alpha, root
            if root >= 0.995 * target or alpha >= limit:
                break
        else:
            outside, high = alpha, root
        if math.isinf(outside):
            alpha = min(inside * min(4.0, max(1.2, 1.1 * target / max(low, 1e-30))), limit)
        elif math.isinf(high) or inside == 0.0:
            alpha = inside + (outside - inside) * (0.2 if math.isinf(high) else 0.5)
            if inside == 0.0 and not math.isinf(high):
                alpha = outside * 0.95 * target / high
        else:
            share = (0.9975 * target - low) / (high - low)
            alpha = inside + (outside - inside) * min(0.95, max(0.05, share))
    return inside
