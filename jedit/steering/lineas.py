"""LinEAS: affine maps of many layers, learnt together by optimal transport (arXiv 2503.10679).

    min over ω, b    Σ_ℓ Σ_j W(ξ_ℓj, η_ℓj) / c_ℓj  +  λ₁ Σ|·|  +  λ₂ Σ_ℓ √d_ℓ ‖·‖
    h_ℓ <- ω_ℓ h_ℓ + b_ℓ      at all layers at once

    ξ_ℓj   unit j of layer ℓ of the source's rows, in the moved network: each layer sees what the
           layers before it were moved to      η_ℓj   of the target's rows, in the network as it is
    W      squared distance of sorted values: the one-dimensional Wasserstein distance W₂²
    c_ℓj   mean square of the unit over both sets, in the network as it is
    λ₁, λ₂ `Sparsity`; they are of ω - 1 and of b/√c_ℓj, so that what is left alone stays 1 and 0

A step goes down the gradient and then takes the proximal map of both penalties, soft thresholds
first and the layer's group after:

    x <- (1 - ρ λ₂ √d / ‖s‖)₊ s        s = sign(x) (|x| - ρ λ₁)₊        ρ    learning rate

Differences. Confirmed [paper: sections 3.1 to 3.3, 4.1, algorithm 1; its displayed equations could
not be read] are the affine maps, the sum over units and layers of one-dimensional distances between
the moved source and the target of the network as it is, that all layers are learnt through the
network, both penalties, of which a layer's gains are one group and its shifts another, plain steps
with the proximal maps in this order, and 32 unpaired rows of each set. The paper's steps are 1,000
of batches, their rate falls from 0.1 along a cosine, its thresholds are λ without the rate, and it
steered for less toxicity without penalties; here each step reads all rows, the rate is constant and
multiplies the thresholds. That the distance is squared, that a row is the mean of its positions and
the factor √d are derived by us. Ours are the division by c_ℓj, which makes one rate fit all units
and layers, and for which a unit's c is a millionth (`DEAD`) of its layer's mean at least; the
defaults of the penalties and of the steps; and that parts that no parameter could hold may be left
out (`identity`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.core.checks import COUNT, NOT_NEGATIVE, POSITIVE, check_finite, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.steering.pooled import Pooled, pooled_outputs, rows_that_count
from jedit.steering.steering import Affine, Steering, units_of
from jedit.tracing import find_sites
from jedit.tracing.rewrite import named_sites

DEAD = 1e-6  # arbitrary


class Sparsity(NamedTuple):
    """Weights of the penalties on how far gains and shifts are from moving nothing.

    Attributes:
        l1: λ₁, of every unit by itself; 0.1 (ours, arbitrary).
        group: λ₂, of a layer's units together; 0.1 (ours, arbitrary).
    """

    l1: float = 0.1
    group: float = 0.1


class LineasInfo(NamedTuple):
    """What the training came to.

    Attributes:
        losses: (steps,) sum of the distances before each step, without the penalties.
        before: by site the distances of its layers, (layers,), before the training.
        after: after it.
        moved: share of the gains and shifts that are not those of the identity.
    """

    losses: Array
    before: dict[str, Array]
    after: dict[str, Array]
    moved: Array

    __repr__ = short_repr


def transport_cost(
    x: Float[Array, "*lead n"], y: Float[Array, "*lead m"], *, power: int = 2
) -> Float[Array, "*lead"]:
    """Return W_p^p of two samples of numbers: the mean |x - y|^p of what is equal in rank.

    Samples of unequal size are compared where their quantile functions are constant together, which
    is exact.

    Args:
        x: one sample; the samples are along the last axis.
        y: the other.
        power: p; 2 (derived by us), and 1 is the distance itself.

    Raises:
        ValueError: the power is no count.
    """
    check_numbers(COUNT, power=power)
    n, m = x.shape[-1], y.shape[-1]
    ends = np.unique(np.concatenate([np.arange(1, n + 1) * m, np.arange(1, m + 1) * n]))
    widths = np.diff(ends, prepend=0) / (n * m)
    x = jnp.sort(x, axis=-1)[..., (ends - 1) // m]
    y = jnp.sort(y, axis=-1)[..., (ends - 1) // n]
    return jnp.einsum("...k,k->...", jnp.abs(x - y) ** power, jnp.asarray(widths, x.dtype))


def proximal_map(
    x: Float[Array, "... units"], *, step_size: float | Array, sparsity: Sparsity
) -> Float[Array, "... units"]:
    """Return argmin over z of ½‖z - x‖² + ρ (λ₁ ‖z‖₁ + λ₂ √d ‖z‖), each row a group by itself.

    Args:
        x: rows of d units.
        step_size: ρ.
        sparsity: λ₁ and λ₂.

    Raises:
        ValueError: a number is out of its range.
    """
    check_numbers(POSITIVE, step_size=step_size)
    check_numbers(NOT_NEGATIVE, **sparsity._asdict())
    s = jnp.sign(x) * jnp.maximum(jnp.abs(x) - step_size * sparsity.l1, 0)
    norm = jnp.linalg.norm(s, axis=-1, keepdims=True)
    most = step_size * sparsity.group * x.shape[-1] ** 0.5
    return s * jnp.maximum(1 - most / jnp.where(norm > 0, norm, 1), 0)


def proximal_step(step_size: float | Array, sparsity: Sparsity) -> optax.GradientTransformation:
    """Let an update end at the proximal map of where it would: last in a chain.

        optax.chain(optax.sgd(0.1), proximal_step(0.1, Sparsity()))

    Args:
        step_size: ρ, the rate of the steps before it.
        sparsity: λ₁ and λ₂; every array's last axis holds the units of a group.

    Raises:
        ValueError: a number is out of its range; at `update`, there are no parameters.
    """
    check_numbers(POSITIVE, step_size=step_size)

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("proximal_step needs the parameters: update(updates, state, params)")

        def moved(step: Array, x: Array) -> Array:
            return proximal_map(x + step, step_size=step_size, sparsity=sparsity) - x

        return jax.tree.map(moved, updates, params), state

    return optax.GradientTransformation(init, update)


@on_auto_axes
def lineas(
    apply: Callable,
    params: PyTree,
    source: Batch,
    target: Batch,
    *,
    start: Steering,
    steps: int = 100,
    learning_rate: float = 0.1,
    sparsity: Sparsity = Sparsity(),  # noqa: B008 - a tuple of numbers
) -> tuple[Steering, LineasInfo]:
    """Learn maps that move the source's rows to where the target's are, at all sites together.

        start = identity(apply, params, rows.inputs, sites)
        steering, info = lineas(apply, params, rows, others, start=start)

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays.
        source: rows as they are, all of them read in every step; 32 in the paper.
        target: rows as they are to become, unpaired.
        start: gains and shifts to begin with, in any shape of `Affine`, which say what is learnt
            too: what is None stays so.
        steps: how many steps; 100 (ours, arbitrary).
        learning_rate: ρ of the plain steps; 0.1, with which the paper's begin.
        sparsity: λ₁ and λ₂.

    Returns:
        The steering, its arrays (layers, units), and what the training came to. A step costs a
        forward and a backward pass over the source's rows.

    Raises:
        ValueError: a number out of its range, a start with gates or with nothing to be learnt, or
            what `pooled_outputs` refuses.
        FloatingPointError: the maps left the finite numbers: lower the rate.
    """
    check_numbers(COUNT, steps=steps)
    check_numbers(POSITIVE, learning_rate=learning_rate)
    check_numbers(NOT_NEGATIVE, **sparsity._asdict())
    if gated := [name for name, one in start.maps.items() if one.gate is not None]:
        raise ValueError(f"{gated} have gates, of which none is learnt")
    (source,), (target,) = rows_that_count(source), rows_that_count(target)
    start = _by_layer(apply, params, source, start)
    maps, losses, first, last = _learn(
        apply, steps, params, source, target, start, learning_rate, sparsity
    )
    check_finite("LinEAS's maps", maps, "lower learning_rate")
    learnt = {name: maps.maps[name] for name in start.maps}
    parts = [
        part != still
        for one in learnt.values()
        for part, still in ((one.gain, 1), (one.shift, 0))
        if part is not None
    ]
    moved = jnp.mean(jnp.concatenate([part.reshape(-1) for part in parts]).astype(jnp.float32))
    return Steering(learnt), LineasInfo(losses, first, last, moved)


def _by_layer(apply: Callable, params: PyTree, rows: Batch, start: Steering) -> Steering:
    """Return a start whose arrays are (layers, units), in which each layer is a group.

    Raises:
        ValueError: there is nothing to be learnt, or a name or a shape is not the function's.
    """
    if not any(part is not None for one in start.maps.values() for part in (one.gain, one.shift)):
        raise ValueError("start has no gain and no shift, so that there is nothing to be learnt")
    sites = named_sites(find_sites(apply, params, rows.inputs), start.maps)

    def part(name: str, what: str) -> Array | None:
        given = getattr(start.maps[name], what)
        return None if given is None else units_of(name, sites[name], given, what)

    return Steering({name: Affine(part(name, "gain"), part(name, "shift")) for name in start.maps})


@functools.partial(jax.jit, static_argnums=(0, 1))
def _learn(
    apply: Callable,
    steps: int,
    params: PyTree,
    source: Batch,
    target: Batch,
    start: Steering,
    learning_rate: Array,
    sparsity: Sparsity,
) -> tuple[Steering, Array, dict[str, Array], dict[str, Array]]:
    still = Steering({name: Affine() for name in start.maps})
    wanted, before = (pooled_outputs(apply, params, rows, still) for rows in (target, source))
    squares = {
        name: (jnp.mean(h**2, axis=1) + jnp.mean(before[name] ** 2, axis=1)) / 2
        for name, h in wanted.items()
    }
    spread = {name: jnp.sqrt(_floored(square)) for name, square in squares.items()}

    def distances(free: Any) -> dict[str, Array]:
        found = pooled_outputs(apply, params, source, _steering(free, spread))
        return _distances(found, wanted, spread)

    def loss(free: Any) -> Array:
        return sum(jnp.sum(x) for x in distances(free).values())  # type: ignore[return-value]

    optimizer = optax.chain(optax.sgd(learning_rate), proximal_step(learning_rate, sparsity))

    def step(carry, _):
        free, state = carry
        value, gradient = jax.value_and_grad(loss)(free)
        updates, state = optimizer.update(gradient, state, free)
        return (optax.apply_updates(free, updates), state), value

    free = _free(start, spread)
    (learnt, _), losses = jax.lax.scan(step, (free, optimizer.init(free)), length=steps)
    return _steering(learnt, spread), losses, distances(free), distances(learnt)


def _distances(found: Pooled, wanted: Pooled, spread: dict[str, Array]) -> dict[str, Array]:
    """Return W / c summed over the units of each layer."""
    costs = {
        name: transport_cost(jnp.swapaxes(h, 1, 2), jnp.swapaxes(wanted[name], 1, 2))
        for name, h in found.items()
    }
    return {name: jnp.sum(cost / spread[name] ** 2, axis=-1) for name, cost in costs.items()}


def _floored(squares: Float[Array, "layers units"]) -> Float[Array, "layers units"]:
    """Return c, of units that are nearly dead a millionth of their layer's mean."""
    least = DEAD * jnp.mean(squares, axis=-1, keepdims=True)
    return jnp.maximum(squares, jnp.where(least > 0, least, 1))


def _free(start: Steering, spread: dict[str, Array]) -> Any:
    """Return ω - 1 and b/√c, which the penalties are of."""
    free = {}
    for name, one in start.maps.items():
        unit = spread[name]
        shift = None if one.shift is None else one.shift.astype(unit.dtype) / unit
        gain = None if one.gain is None else one.gain.astype(unit.dtype) - 1
        free[name] = (gain, shift)
    return free


def _steering(free: Any, spread: dict[str, Array]) -> Steering:
    def one(name: str) -> Affine:
        gain, shift = free[name]
        unit = spread[name]
        return Affine(
            gain=None if gain is None else 1 + gain, shift=None if shift is None else shift * unit
        )

    return Steering({name: one(name) for name in free})
