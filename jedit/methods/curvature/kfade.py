"""K-FADE: ascend the forget loss in the metric of the retain outputs (arXiv 2602.10568).

    maximise gᵀΔ   subject to   KL_retain(θ₀, θ₀ + Δ) ≈ ½ Δᵀ F Δ ≤ ε

    g   gradient of the forget loss to be raised             `objective` (its negative)
    F   Gauss-Newton matrix of the retain output KL at θ₀    `curvature`
    λ   damping, in units of each block's mean eigenvalue    `damping`
    ε   retain KL to be spent, nats per unmasked output      `budget`
    d   (F + λ)⁻¹ g, the direction; Δ = α d                  the step

A step moves by α d, g is computed again at the new point, the factors are kept unless `refit` makes
new ones there. With `step_size` α is given. With `budget` α is the largest for which the *true*
KL(θ₀ ‖ θ) on the retain rows stays within ε (k/K)² after step k of K: KL is quadratic in the
distance, so K aligned steps have equal lengths.

Gradients, steps and the edit are of the parameters that the curvature covers and of no others. Δ is
summed in float32 or wider and rounded once, to θ₀'s dtype, where a model is computed: at
round(θ₀ + Δ), which is what `apply_edit` returns. Beside θ₀ and the curvature the method holds
three times Δ and what one forward and backward pass needs; or twice Δ and twice a block. Factors
without eigenvectors are inverted once for all steps and their inverses, as large as they, held
beside them: in the host's memory where `to_host` put the curvature, block by block on the device.

Differences. The paper takes one or a few steps of a stated length with absolute damping 1e-8 and
labels as given [notes]. Ours [derived]: labels sampled from the model, since F is the
Gauss-Newton matrix of an output KL; damping relative to the block, because an absolute one has no
scale; the line search, because the quadratic model is wrong by orders of magnitude on a memorised
model; the curvature's likelihood at a temperature above one, because there the Fisher of the
outputs vanishes and protects nothing; any objective in place of the cross-entropy, whose gradient
vanishes as p -> 1. As λ -> ∞ the method is gradient ascent, each matrix at a rate of one over its
mean eigenvalue; with G = I it is preconditioning by the inputs alone.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.arguments import (
    batch_list,
    check_function,
    check_kind,
    check_params,
    refuse_tracers,
)
from jedit.core.batch import Batch
from jedit.core.checks import COUNT, NOT_NEGATIVE, POSITIVE, check_finite, check_numbers, culprit
from jedit.core.devices import kept, on_auto, on_auto_axes, places_of
from jedit.core.display import short_repr
from jedit.core.outputs import counted_outputs
from jedit.core.precision import exponents, shifted, wide, wide_dtype
from jedit.core.row_blocks import in_row_blocks
from jedit.curvature import Curvature, Inverted, Kronecker, inverted, quadratic_form, solve
from jedit.curvature.checks import check_counted, check_covers
from jedit.curvature.likelihoods import Categorical, Likelihood
from jedit.curvature.memory import Footprint, group_paths
from jedit.edits import Edit
from jedit.geometry import RetainKl, largest_step_within
from jedit.geometry.parts import ahead, moved, part_of, with_part
from jedit.geometry.trust_region import num_counted
from jedit.methods._entrance import check_rows, refuse_zero_gradients, stop_if_not_finite
from jedit.objectives import GA, Objective


class KfadeInfo(NamedTuple):
    """Measurements of K-FADE's steps, arrays of shape (steps,).

    Attributes:
        step_size: α.
        curvature_kl: ½ ΔᵀFΔ of the whole change so far, by the curvature at its own temperature.
        predicted_kl: ½ ΔᵀGΔ, G the matrix-free Gauss-Newton matrix of the retain outputs at θ₀.
        true_kl: KL(θ₀ ‖ θ) on the retain rows, nats per unmasked output; θ = round(θ₀ + Δ) as
            the parameters' dtype holds it, while the other two are of Δ itself.
        objective: value of the objective before the step.
        gradient_norm: ‖g‖ over the covered parameters.
        retain_cosine: cosine of g with the gradient of the retain loss (NaN without targets, and of
            a curvature in parts).
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
    """Return the method's d = -(F + λ)⁻¹ g for the gradient of an objective to be lowered."""
    step = solve(curvature, gradient, damping=damping)
    return jax.tree.map(jnp.negative, step)


@dataclasses.dataclass(frozen=True)
class Ascent:
    """Settings of the ascent of the forget loss: the objective, its steps and their measure.

    Attributes:
        steps: number of steps. Paper: a few; 4 is what our table was made with.
        step_size: α of every step, in place of a budget.
        refit: `params -> Curvature`, of the retain outputs there, called before every step but the
            first; None: the factors are kept.
        objective: objective that is lowered, with θ₀ for its reference; `GA()` is the negative
            forget loss.
        likelihood: likelihood of the outputs; its KL is what a budget is in.
    """

    steps: int = 4
    step_size: float | None = None
    refit: Callable[[PyTree], Curvature] | None = None
    objective: Objective = GA()  # noqa: RUF009 - frozen and hashable
    likelihood: Likelihood = Categorical()  # noqa: RUF009 - frozen and hashable

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, steps=self.steps)
        check_numbers(POSITIVE, step_size=self.step_size)


@on_auto_axes
def kfade(
    apply: Callable,
    params: PyTree,
    curvature: Curvature | Iterator[Curvature] | Sequence[Curvature],
    forget: Batch | Sequence[Batch],
    retain: Batch | Sequence[Batch],
    *,
    budget: float | None = None,
    damping: float | Array = 1e-2,
    ascent: Ascent = Ascent(),  # noqa: B008 - frozen and hashable
) -> tuple[Edit, KfadeInfo]:
    """Edit a model to forget, at a stated price in retain KL.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`.
        params: the trained parameters θ₀.
        curvature: curvature of the retain outputs at θ₀, from `estimate`; only what it covers is
            edited. Or, for one step, those of parts of the parameters, as `estimate_in_groups`
            yields them: d is found part by part, each with a gradient of its own, and of the
            curvature no more is there than one part, with the inverses of its factors.
        forget: rows to forget, with targets; one batch, or several of one shape.
        retain: rows on which the KL is measured; not those of the final evaluation.
        budget: true retain KL to be spent, nats per unmasked output, and kept to. Give this or the
            ascent's `step_size`.
        damping: in units of each block's mean eigenvalue (ours; 0.01 to 0.1 were best).
        ascent: the objective, the number of its steps and their measure.

    Returns:
        The edit, of the covered parameters alone, in float32 or wider; `cast_report` says what of
        it a narrower parameter takes. And what each step predicted and did.

    Raises:
        TypeError: an argument of another type.
        ValueError: not exactly one of `budget` and `step_size`, or a number out of its range; no
            batch; rows or a curvature that count no output; a curvature of other parameters; masks
            or labels that are none; a gradient that is zero from the start; or a call under
            `jax.jit` or another transformation.
        FloatingPointError: parameters, rows, objective or gradient are not finite; named.
    """
    check_numbers(POSITIVE, budget=budget)
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_kind(ascent, Ascent, "ascent", "such as Ascent(steps=4)")
    check_function(apply)
    check_function(ascent.objective, "objective", "(apply, params, forget, retain, reference)")
    check_params(params)
    forget, retain = batch_list(forget, "forget"), batch_list(retain, "retain")
    steps, likelihood, objective = ascent.steps, ascent.likelihood, ascent.objective
    parts = curvature if isinstance(curvature, Iterator | list | tuple) else None
    if parts is None:
        check_covers(curvature, params)  # pyright: ignore[reportArgumentType]
    elif steps != 1:
        raise ValueError(
            f"a curvature in parts is gone through once, for one step, but the ascent has {steps}; "
            "give Ascent(steps=1), or a curvature that is whole"
        )
    given = (params, curvature if parts is None else None, forget, retain)
    refuse_tracers("kfade", given, "`batch_unlearn` and `solve` can")
    if (budget is None) == (ascent.step_size is None):
        raise ValueError(
            "give exactly one of budget (true retain KL, nats) and the ascent's step_size (alpha)"
        )
    price = RetainKl(apply, params, retain, likelihood=likelihood)
    check_rows(apply, likelihood, params, forget=forget, retain=price.batches)
    counts = [num_counted(apply, likelihood, params, batch) for batch in forget]
    sets = {"forget": forget, "retain": price.batches}
    why = functools.partial(culprit, params, sets)
    if parts is not None:
        search = _Search(objective, price, budget, ascent.step_size)
        return _step_in_parts(search, apply, params, parts, damping, (forget, counts), why)
    assert isinstance(curvature, Curvature)  # or `check_covers` had refused it
    rows = []
    change: dict[str, Array] = {}
    alpha, metric = ascent.step_size, curvature
    inverse = inverted(metric, damping=damping)
    for k in range(steps):
        if k and ascent.refit is not None:
            del metric, inverse  # before the next ones are made
            metric = ascent.refit(moved(params, change))
            check_covers(metric, params)
            inverse = inverted(metric, damping=damping)
        check_counted(metric.num_outputs)
        covered = part_of(params, metric.covered)
        change = {path: _wide_zeros(x) for path, x in covered.items()} | change
        where = (tuple(covered), params, change)
        value, gradient = _objective_gradient(
            objective, apply, where, forget, counts, price.batches
        )
        stop_if_not_finite(f"step {k}", value, gradient, params, sets)
        norm = float(_norm(gradient))
        if k == 0:
            refuse_zero_gradients(norm, "forget")
        cosine = _retain_cosine(apply, likelihood, where, gradient, price.batches)
        move, n = _at_unit(_block_by_block(inverse, gradient))
        unit = 2.0 ** -int(n)
        allowed = math.inf
        if budget is not None and norm:
            # KL grows with the square of the distance: by this schedule the steps are of about
            # equal length.
            allowed = budget * ((k + 1) / steps) ** 2
            # The search for α starts at the last step's, in the units of this step's scaled
            # direction.
            start = alpha / unit if alpha else _first_guess(allowed, _quadratic(metric, move))
            along = functools.partial(price, move, start=change)
            alpha = unit * largest_step_within(along, start, allowed)
            del along
        alpha = alpha or 0.0  # later gradients may be zero, as of rows that are forgotten
        change = _ahead(change, move, alpha / unit, places_of(part_of(params, change)))
        # Freed before the KL's forward pass: a direction is as large as the parameters.
        del move
        true_kl = price(change)
        check_finite(f"step {k}: the retain KL", true_kl, why)
        check_finite(f"step {k}: the edit", change, why)
        rows.append(
            dict(
                step_size=alpha if norm else 0.0,
                curvature_kl=0.5 * float(_quadratic(metric, change)),
                predicted_kl=price.predicted(change),
                true_kl=true_kl,
                objective=value,
                gradient_norm=norm,
                retain_cosine=cosine,
                within_budget=true_kl <= allowed * (1 + 1e-3),
            )
        )
    info = KfadeInfo(*(np.asarray([row[field] for row in rows]) for field in KfadeInfo._fields))
    return Edit({path: change[path] for path in part_of(params, change)}), info


class _Search(NamedTuple):
    objective: Objective
    price: RetainKl
    budget: float | None
    step_size: float | None


def _step_in_parts(search, apply, params, parts, damping, rows, why) -> tuple[Edit, KfadeInfo]:
    """Make one step in curvatures that come one after the other, each dropped when it is used.

    Raises:
        ValueError: two of them cover one parameter.
    """
    forget, counts = rows
    objective, price, budget, alpha = search
    move: dict[str, Array] = {}
    quadratic = squares = 0.0
    value = math.nan
    # What an iterator gives lies where its maker had it, maybe on explicit axes.
    for part in map(on_auto, parts):
        check_covers(part, params)
        check_counted(part.num_outputs)
        if again := sorted(set(part.covered) & set(move)):
            raise ValueError(f"two parts of the curvature cover {again[0]}; each must be in one")
        where = (tuple(part_of(params, part.covered)), params, {})
        value, gradient = _objective_gradient(
            objective, apply, where, forget, counts, price.batches
        )
        stop_if_not_finite("step 0", value, gradient, params, {"forget": forget})
        squares += float(_norm(gradient)) ** 2
        found = _block_by_block(inverted(part, damping=damping), gradient)
        unit, n = _at_unit(found)
        quadratic += math.ldexp(float(_quadratic(part, unit)), 2 * int(n))
        move |= found
        # Before the next part is made: the loop would hold this one beside it.
        del part, unit, gradient, found
    refuse_zero_gradients(squares, "forget")
    allowed = math.inf
    if budget is not None:
        allowed = budget
        start = math.sqrt(2 * allowed / max(quadratic, sys.float_info.min))
        alpha = largest_step_within(functools.partial(price, move), start, allowed)
    assert alpha is not None  # one of the two is given
    # Leaf by leaf, so that the direction and the edit are never both whole.
    change = {
        path: ahead({}, {path: move.pop(path)}, alpha)[path] for path in part_of(params, move)
    }
    true_kl = price(change)
    check_finite("step 0: the retain KL", true_kl, why)
    check_finite("step 0: the edit", change, why)
    row = dict(
        step_size=alpha,
        curvature_kl=0.5 * alpha**2 * quadratic,
        predicted_kl=price.predicted(change),
        true_kl=true_kl,
        objective=value,
        gradient_norm=math.sqrt(squares),
        retain_cosine=math.nan,
        within_budget=true_kl <= allowed * (1 + 1e-3),
    )
    return Edit(change), KfadeInfo(**{name: np.asarray([x]) for name, x in row.items()})


def _wide_zeros(x: Array) -> Array:
    return jnp.zeros_like(x, dtype=wide_dtype(x.dtype))


def _objective_gradient(objective, apply, where, forget, counts, retain):
    """Average the objective and its gradient over the forget batches, by counted outputs."""
    total = None
    for i, batch in enumerate(forget):
        share = counts[i] / max(sum(counts), 1)
        rows = (batch, retain[i % len(retain)])
        total = _add_gradient(objective, apply, *where, *rows, share, total)
    assert total is not None  # there is a batch
    value, gradient = total
    return float(value), gradient


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=8)
def _add_gradient(objective, apply, paths, params, change, forget, retain, share, total):
    """Add one batch's share of value and gradient in these parameters to the sum so far."""
    current = moved(params, change)

    def lowered(part):
        return objective(apply, with_part(current, part), forget, retain, params)

    (value, _), gradient = jax.value_and_grad(lowered, has_aux=True)(part_of(current, paths))
    one = jax.tree.map(lambda x: wide(x) * jnp.asarray(share, wide(x).dtype), (value, gradient))
    return one if total is None else jax.tree.map(jnp.add, total, one)


def _at_unit(part: dict[str, Array]) -> tuple[dict[str, Array], Array]:
    """Return (x / 2ⁿ, n) with the entries about one."""
    # Rows that are known well have gradients so small that their squares vanish in float32. A power
    # of two shifts the exponents alone: no digit of an entry changes.
    shift = exponents(part)
    return shifted(part, jax.tree.map(jnp.negative, shift)), next(iter(shift.values()))


def _first_guess(allowed: float, quadratic: Array) -> float:
    return math.sqrt(2 * allowed / max(float(quadratic), 1e-30))


def _block_by_block(inverse: Inverted, gradient: dict[str, Array]) -> dict[str, Array]:
    """Return d = -(F + λ)⁻¹ g for the gradient of an objective to be lowered, which is used up.

    One block's temporaries are there at a time. Blocks go in under numbers instead of their names,
    so that equal ones share a program.
    """
    move = {}
    needs = (Footprint(block.weight.paths, {n: 1}) for n, block in inverse.blocks.items())
    for paths in group_paths(needs, 1):
        number = {path: str(i) for i, path in enumerate(paths)}
        part = {number[path]: gradient.pop(path) for path in paths}
        # Dispatch is asynchronous: unless one waits, the temporaries of several blocks coexist.
        found = jax.block_until_ready(_direction(_renumbered(inverse, number), part))
        move |= {path: found[i] for path, i in number.items()}
    return move


def _renumbered(inverse: Inverted, number: Mapping[str, str]) -> Inverted:
    """Return the blocks of these paths, and the factors they need, under numbers for names."""
    held = {n: b for n, b in inverse.blocks.items() if b.weight.path in number}
    kroneckers = (b for b in held.values() if isinstance(b, Kronecker))
    names = dict.fromkeys(name for b in kroneckers for name in (b.input, b.output))
    factor = {name: str(i) for i, name in enumerate(names)}

    def renumbered(block):
        bias = block.weight.bias_path
        weight = dataclasses.replace(
            block.weight,
            path=number[block.weight.path],
            bias_path=None if bias is None else number[bias],
        )
        if not isinstance(block, Kronecker):
            return dataclasses.replace(block, weight=weight)
        ends = {"input": factor[block.input], "output": factor[block.output]}
        return dataclasses.replace(block, weight=weight, **ends)

    blocks = {str(i): renumbered(block) for i, block in enumerate(held.values())}
    whole = inverse.decomposed
    decomposed = Curvature(
        {str(i): blocks[str(i)] for i, name in enumerate(held) if name in whole.blocks},
        {i: whole.factors[name] for name, i in factor.items() if name in whole.factors},
        whole.num_outputs,
    )
    inverses = {i: inverse.inverses[n] for n, i in factor.items() if n in inverse.inverses}
    return dataclasses.replace(inverse, blocks=blocks, decomposed=decomposed, inverses=inverses)


@functools.partial(jax.jit, donate_argnums=1)
def _direction(inverse, gradient):
    return jax.tree.map(jnp.negative, inverse(gradient))


@jax.jit
def _norm(tree):
    unit, n = _at_unit(tree)
    root = jnp.sqrt(_dot(unit, unit))
    return root * jnp.ldexp(jnp.ones((), root.dtype), n)


def _dot(x, y):
    parts = jax.tree.map(lambda a, b: jnp.vdot(a, b).astype(jnp.float32), x, y)
    return sum(jax.tree.leaves(parts), jnp.zeros((), jnp.float32))


def _retain_cosine(apply, likelihood, where, gradient, retain) -> float:
    """Return the cosine of the ascent gradient with the retain loss's, on the first batch."""
    if retain[0].targets is None:
        return math.nan
    return -float(_cosine(apply, likelihood, *where, gradient, retain[0]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _cosine(apply, likelihood, paths, params, change, gradient, batch):
    current = moved(params, change)

    def values(outputs, rows):
        counted = counted_outputs(rows, likelihood.lead_shape(outputs[0]))
        return jnp.where(counted, likelihood.nll(outputs[0], rows.targets), 0), counted

    def loss(part):
        nll, counted = in_row_blocks(values, apply, (with_part(current, part),), batch)
        return jnp.sum(nll) / jnp.maximum(jnp.sum(counted), 1).astype(nll.dtype)

    # Both are scaled by powers of two before they are squared, which no cosine notices.
    other = jax.tree.map(wide, jax.grad(loss)(part_of(current, paths)))
    gradient, other = (
        shifted(g, jax.tree.map(jnp.negative, exponents(g))) for g in (gradient, other)
    )
    norms = jnp.sqrt(_dot(gradient, gradient)) * jnp.sqrt(_dot(other, other))
    return jnp.where(norms > 0, _dot(gradient, other) / jnp.where(norms > 0, norms, 1), 0)


@functools.partial(jax.jit, static_argnums=3)
def _ahead(change, move, alpha, places):
    return kept(ahead(change, move, alpha), places)  # as the parameters lie


_quadratic = jax.jit(quadratic_form)
