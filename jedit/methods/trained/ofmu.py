"""OFMU: forget by ascent that is kept off the retain gradient, then repair (arXiv 2509.22483).

    inner   maximise Φ(θ) = L_f(θ) - β cos(∇L_f, ∇L_r)                  `ascent`
            ∇Φ = ∇L_f - β (∇²L_f a + ∇²L_r b),   a, b = ∂cos/∂(∇L_f, ∇L_r)
    outer   minimise F(θ) = L_r(θ) + ρ_k |∇Φ(θ)|²                       `descent`
            ∇F = ∇L_r + 2 ρ_k ∇²Φ ∇Φ

    L_f   what is raised: the negative of the objective        `objective`
    L_r   mean NLL of the retain rows                          `held`
    β     weight of the decorrelation                          `beta`
    T     inner steps to an outer one, 5 to 10                 `inner_steps`
    ρ_k   penalty at the k-th outer step, rising: ρ (k + 1)    `penalty`

The penalty asks the repair to stay where the inner problem is solved.  Every ∇² is a product with a
vector, by forward over reverse: no Hessian is formed.

Differences.  The two problems, the products and T are the paper's [notes]; no code was there to be
read.  Plain ascent has no stationary point for the penalty to hold, so L_f is bounded: the negative
of NPO, at most 0 [derived].  β, ρ and how ρ_k rises are ours.  The norms of the cosine have ε =
1e-6 added in squares (ours), as the direction of a forgotten row's gradient is noise.  A step of
the loop is one whole round, T inner steps and the outer one on the same rows (ours), so that a run
can only be stopped after a repair; each kind has an optimizer state of its own, so that Adam's
averages of the ascent are not spent in the repair.  Gradients, cosine and norm are of the
parameters that are trained.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from jedit.core.checks import COUNT, NOT_NEGATIVE, check_numbers
from jedit.core.precision import cast_like, total, wide, wide_dtype
from jedit.objectives import NPO, Objective, RetainNLL, with_retain
from jedit.training.method import TrainingMethod

Loss = Callable[[PyTree], Float[Array, ""]]
EPSILON = 1e-6


def ofmu(
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    inner_steps: int = 5,
    penalty: float = 0.1,
    objective: Objective = NPO(),  # noqa: B008 - frozen and hashable
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make OFMU around any optimizer, which takes T inner steps and the outer one in each step.

        method = ofmu(optax.adam(1e-5))
        params, history = jedit.unlearn(method, apply, params, forget, retain, steps=10, key=key)

    Args:
        optimizer: the optimizer of both kinds of steps, in a state for each.
        beta: β, the weight of the cosine; 0.1 is arbitrary.
        inner_steps: T, ascents before each descent; 5, the least of the paper's.
        penalty: ρ, the penalty's weight at the first outer step; 0.1 is arbitrary.
        objective: what is lowered to forget, bounded from below and without a retain term; NPO.
        held: L_r, the retain objective.

    Returns:
        A method for `jedit.unlearn`, whose history shows the sum of objective and retain loss at
        the beginning of each round. A step costs about three gradients of both sets for each ascent
        and seven for the descent, 22 of them by default; the descent, a derivative of a derivative
        of a gradient, holds several times a gradient's activations, of both sets.

    Raises:
        ValueError: a number out of its range.
    """
    check_numbers(NOT_NEGATIVE, beta=beta, penalty=penalty)
    check_numbers(COUNT, inner_steps=inner_steps)
    rounds = _rounds(optimizer, beta, inner_steps, penalty)
    return TrainingMethod(with_retain(objective, held), rounds, _Losses(objective, held))


def cosine(g_f: PyTree, g_r: PyTree) -> Float[Array, ""]:
    """Return the cosine of two gradients, with ε in both norms."""

    def dot(x: PyTree, y: PyTree) -> Array:
        return total(jax.tree.map(lambda a, b: jnp.sum(wide(a) * wide(b)), x, y))

    return dot(g_f, g_r) / jnp.sqrt((dot(g_f, g_f) + EPSILON**2) * (dot(g_r, g_r) + EPSILON**2))


def ascent(L_f: Loss, L_r: Loss, theta: PyTree, beta: float) -> PyTree:
    """Return ∇Φ, by two products of a Hessian with a vector."""
    g_f, g_r = jax.grad(L_f)(theta), jax.grad(L_r)(theta)
    a, b = jax.grad(cosine, argnums=(0, 1))(g_f, g_r)
    H_a = jax.jvp(jax.grad(L_f), (theta,), (a,))[1]
    H_b = jax.jvp(jax.grad(L_r), (theta,), (b,))[1]
    return jax.tree.map(lambda g, x, y: g - jnp.asarray(beta, g.dtype) * (x + y), g_f, H_a, H_b)


def descent(L_f: Loss, L_r: Loss, theta: PyTree, beta: float, rho: Array) -> PyTree:
    """Return ∇F, by one product of Φ's Hessian with ∇Φ."""

    def gradient(theta: PyTree) -> PyTree:
        return ascent(L_f, L_r, theta, beta)

    H_v = jax.jvp(gradient, (theta,), (gradient(theta),))[1]
    return jax.tree.map(
        lambda g, x: g + 2 * jnp.asarray(rho, g.dtype) * x, jax.grad(L_r)(theta), H_v
    )


@dataclasses.dataclass(frozen=True)
class _Losses:
    """The arguments of the transform: both losses, as functions of the parameters."""

    objective: Objective
    held: Objective

    def __call__(
        self, apply: Callable, params: PyTree, forget: PyTree, retain: PyTree, reference: PyTree
    ) -> dict[str, Loss]:
        del params  # the transform asks where it stands
        sets = (forget, retain, reference)
        return {
            "forget_loss_fn": lambda params: -self.objective(apply, params, *sets)[0],
            "retain_loss_fn": lambda params: self.held(apply, params, *sets)[0],
        }


class RoundState(NamedTuple):
    """The state of OFMU's rounds.

    Attributes:
        inner: the optimizer's, of the ascents.
        outer: the optimizer's, of the descents.
        count: the number of rounds made, int32.
    """

    inner: PyTree
    outer: PyTree
    count: Array


def _rounds(
    optimizer: optax.GradientTransformation, beta: float, inner_steps: int, penalty: float
) -> optax.GradientTransformationExtraArgs:
    """Make T steps up Φ and then one down F; the gradient given is not looked at."""
    wrapped = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        inner, outer = (optimizer.init(params) for _ in range(2))
        return RoundState(inner, outer, jnp.zeros((), jnp.int32))

    def update(
        updates, state, params=None, *, forget_loss_fn=None, retain_loss_fn=None, **extra_args
    ) -> Any:
        if params is None or forget_loss_fn is None or retain_loss_fn is None:
            raise ValueError(
                "ofmu needs params and the extra arguments forget_loss_fn and retain_loss_fn"
            )
        del updates
        losses = forget_loss_fn, retain_loss_fn

        def there(moved: PyTree) -> PyTree:
            return jax.tree.map(lambda p, m: (p.astype(m.dtype) + m).astype(p.dtype), params, moved)

        # Summed wide: small steps would be lost one by one beside narrow parameters.
        def further(moved: PyTree, step: PyTree) -> PyTree:
            return jax.tree.map(lambda m, u: m + u.astype(m.dtype), moved, step)

        def up(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
            moved, inner = carry
            theta = there(moved)
            down = jax.tree.map(jnp.negative, ascent(*losses, theta, beta))
            step, inner = wrapped.update(down, inner, theta, **extra_args)
            return (further(moved, step), inner), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide_dtype(p.dtype)), params)
        (moved, inner), _ = lax.scan(up, (zeros, state.inner), None, length=inner_steps)
        theta = there(moved)
        rho = penalty * (state.count + 1).astype(jnp.result_type(float))
        repair = descent(*losses, theta, beta, rho)
        step, outer = wrapped.update(repair, state.outer, theta, **extra_args)
        whole = cast_like(further(moved, step), params)
        return whole, RoundState(inner, outer, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)
