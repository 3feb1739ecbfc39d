"""K-FADE: ascend the forget loss in the metric of the retain outputs (arXiv 2602.10568).

    maximise gᵀΔ   subject to   KL_retain(θ₀, θ₀ + Δ) ≈ ½ Δᵀ F Δ ≤ ε

    g   gradient of the forget loss to be raised             `objective` (its negative)
    F   Gauss-Newton matrix of the retain output KL at θ₀    `curvature`
    λ   damping, in units of each block's mean eigenvalue    `damping`
    ε   retain KL to be spent, nats per unmasked output      `budget`
    d   (F + λ)⁻¹ g, the direction; Δ = α d                  the step

A step moves by α d, g is computed again at the new point, the factors are kept. With `step` α is
given. With `budget` α is the largest for which the *true* KL(θ₀ ‖ θ) on the retain rows stays
within ε (k/K)² after step k of K: KL is quadratic in the distance, so K aligned steps have equal
lengths.

Differences. The paper takes one or a few steps of a stated length with absolute damping 1e-8 and
labels as given [notes]. Ours [derived]: labels sampled from the model, since F is the
Gauss-Newton matrix of an output KL; damping relative to the block, because an absolute one has no
scale; the line search, because the quadratic model is wrong by orders of magnitude on a memorised
model; the curvature's likelihood at a temperature above one, because there the Fisher of the
outputs vanishes and protects nothing; any objective in place of the cross-entropy, whose gradient
vanishes as p -> 1. As λ -> ∞ the method is gradient ascent, each matrix at a rate of one over its
mean eigenvalue; with G = I it is preconditioning by the inputs alone.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.arguments import batch_list, check_function, check_params, refuse_tracers
from jedit.curvature import Curvature, quadratic_form, solve
from jedit.curvature.blocks import check_covers
from jedit.curvature.likelihoods import Categorical, Likelihood
from jedit.display import short_repr
from jedit.edits import Edit, edit_between
from jedit.geometry import RetainKl, largest_step_within
from jedit.geometry.trust_region import moved, num_counted
from jedit.objectives import ga
from jedit.outputs import counted_outputs
from jedit.typing import Batch


class KfadeInfo(NamedTuple):
    """What K-FADE did, step by step; arrays of shape (steps,).

    Attributes:
        step_size: α.
        curvature_kl: ½ ΔᵀFΔ of the whole change so far, by the curvature at its own temperature.
        predicted_kl: ½ ΔᵀGΔ, G the matrix-free Gauss-Newton matrix of the retain outputs at θ₀.
        true_kl: KL(θ₀ ‖ θ) on the retain rows, nats per unmasked output.
        objective: value of the objective before the step.
        gradient_norm: ‖g‖ over the covered parameters.
        retain_cosine: cosine of g with the gradient of the retain loss (NaN without targets).
        within_budget: whether the true KL is within what the step was allowed (True without one).
    """

    step_size: np.ndarray
    curvature_kl: np.ndarray
    predicted_kl: np.ndarray
    true_kl: np.ndarray
    objective: np.ndarray
    gradient_norm: np.ndarray
    retain_cosine: np.ndarray
    within_budget: np.ndarray

    __repr__ = short_repr


def direction(curvature: Curvature, gradient: PyTree, damping: float | Array) -> PyTree:
    """The method's algebra: d = -(F + λ)⁻¹ g for the gradient of an objective to be lowered."""
    step = solve(curvature, gradient, damping=damping, relative=True)
    return jax.tree.map(jnp.negative, step)


def kfade(
    apply: Callable,
    params: PyTree,
    curvature: Curvature | Callable[[PyTree], Curvature],
    forget: Batch | Sequence[Batch],
    retain: Batch | Sequence[Batch],
    *,
    budget: float | None = None,
    step: float | None = None,
    steps: int = 4,
    damping: float | Array = 1e-2,
    likelihood: Likelihood = Categorical(),  # noqa: B008 - frozen and hashable
    objective: Callable | None = None,
) -> tuple[Edit, KfadeInfo]:
    """Edit a model to forget, at a stated price in retain KL.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`.
        params: the trained parameters θ₀.
        curvature: of the retain outputs at θ₀, from `estimate`; only what it covers is edited. A
            function of the parameters is called before each step instead (factors refitted).
        forget: what to forget, with targets; one batch, or several of one shape.
        retain: rows on which the KL is measured; not those of the final evaluation.
        budget: true retain KL to be spent, nats per unmasked output. Give this or `step`.
        step: α of every step.
        steps: number of steps. Paper: a few; 4 is what our table was made with.
        damping: in units of each block's mean eigenvalue (ours; 0.01 to 0.1 were best).
        likelihood: what the outputs mean; its KL is what the budget is in.
        objective: `objective(params, forget, retain) -> (scalar, aux)`, lowered; None: `ga`, the
            negative forget loss. Bind other arguments with `functools.partial`, once, outside of a
            loop: each new function object compiles again.

    Returns:
        The edit, and what each step predicted and did.

    Raises:
        TypeError: an argument that is something else.
        ValueError: not exactly one of `budget` and `step`, or one that is not positive; no batch; a
            curvature of other parameters; or a call under `jax.jit` or another transformation.
    """
    check_function(apply)
    check_params(params)
    forget, retain = batch_list(forget, "forget"), batch_list(retain, "retain")
    if not callable(curvature):
        check_covers(curvature, params)
    refuse_tracers("kfade", (params, curvature, forget, retain), "`batch_unlearn` and `solve` can")
    if (budget is None) == (step is None):
        raise ValueError("give exactly one of budget (true retain KL, nats) and step (alpha)")
    if not all(value > 0 for value in (budget, step) if value is not None):
        raise ValueError(f"budget and step must be positive, got {budget=}, {step=}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if objective is None:
        objective = _gradient_ascent(apply)
    price = RetainKl(apply, likelihood, params, retain)
    counts = [num_counted(apply, likelihood, params, batch) for batch in forget]
    rows = []
    current, alpha = params, step
    for k in range(steps):
        metric = curvature(current) if callable(curvature) else curvature
        if callable(curvature):
            check_covers(metric, params)
        value, gradient = _objective_gradient(objective, current, forget, counts, price.batches)
        move, norm = _direction(metric, gradient, damping)
        cosine = _retain_cosine(apply, metric, current, gradient, price.batches, likelihood)
        allowed = math.inf
        if budget is not None:
            allowed = budget * ((k + 1) / steps) ** 2
            start = alpha or math.sqrt(2 * allowed / max(float(_quadratic(metric, move)), 1e-30))
            alpha = largest_step_within(functools.partial(price, current, move), start, allowed)
        current = moved(current, move, alpha)
        change = jax.tree.map(jnp.subtract, current, params)
        true_kl = price(params, change, 1.0)
        rows.append(
            dict(
                step_size=alpha,
                curvature_kl=0.5 * float(_quadratic(metric, change)),
                predicted_kl=price.predicted(change),
                true_kl=true_kl,
                objective=value,
                gradient_norm=float(norm),
                retain_cosine=cosine,
                within_budget=true_kl <= allowed * (1 + 1e-3),
            )
        )
    info = KfadeInfo(*(np.asarray([row[field] for row in rows]) for field in KfadeInfo._fields))
    return edit_between(params, current), info


@functools.cache
def _gradient_ascent(apply: Callable) -> Callable:
    """One objective object for one model, so that repeated calls compile once."""
    return functools.partial(ga, apply=apply)


@functools.partial(jax.jit, static_argnames="objective")
def _value_and_gradient(objective, params, forget, retain):
    (value, _), gradient = jax.value_and_grad(objective, has_aux=True)(params, forget, retain)
    return value, gradient


def _objective_gradient(objective, params, forget, counts, retain):
    """Mean of the objective and of its gradient over the forget batches, by counted outputs."""

    def weighted(i: int):
        total = _value_and_gradient(objective, params, forget[i], retain[i % len(retain)])
        share = counts[i] / max(sum(counts), 1)
        return jax.tree.map(lambda x: x * jnp.asarray(share, x.dtype), total)

    value, gradient = functools.reduce(
        lambda total, i: jax.tree.map(jnp.add, total, weighted(i)),
        range(1, len(forget)),
        weighted(0),
    )
    return float(value), gradient


@jax.jit
def _direction(curvature, gradient, damping):
    move = direction(curvature, gradient, damping)
    return move, _norm(curvature, gradient)


def _norm(curvature, tree):
    return jnp.sqrt(_covered_dot(curvature, tree, tree))


def _covered_dot(curvature, x, y):
    """Inner product over the parameters that the curvature covers."""
    kept = set(curvature.covered)
    pairs = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (
            jnp.vdot(a, b).astype(jnp.float32)
            if jax.tree_util.keystr(path, simple=True, separator="/") in kept
            else jnp.zeros((), jnp.float32)
        ),
        x,
        y,
    )
    return sum(jax.tree.leaves(pairs))


@functools.partial(jax.jit, static_argnames=("apply", "likelihood"))
def _retain_gradient(apply, likelihood, params, batch):
    def loss(params):
        outputs = apply(params, batch.inputs)
        counted = counted_outputs(batch, likelihood.lead_shape(outputs))
        nll = jnp.where(counted, likelihood.nll(outputs, batch.targets), 0)
        return jnp.sum(nll) / jnp.maximum(jnp.sum(counted), 1).astype(nll.dtype)

    return jax.grad(loss)(params)


@jax.jit
def _cosine(curvature, x, y):
    norms = _norm(curvature, x) * _norm(curvature, y)
    return jnp.where(norms > 0, _covered_dot(curvature, x, y) / jnp.where(norms > 0, norms, 1), 0)


def _retain_cosine(apply, curvature, params, gradient, retain, likelihood) -> float:
    """Cosine of the ascent gradient with the retain loss's, on the first retain batch."""
    if retain[0].targets is None:
        return math.nan
    retain_gradient = _retain_gradient(apply, likelihood, params, retain[0])
    return -float(_cosine(curvature, gradient, retain_gradient))


_quadratic = jax.jit(quadratic_form)
