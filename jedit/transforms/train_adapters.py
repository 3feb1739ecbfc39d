"""Train low-rank adapters in the place of whole matrices, in any loop that has these' gradients.

    W = W_res + s A B       A (d_in, r), B (r, d_out), and only they are trained
    ∇_A = s G Bᵀ,  ∇_B = s Aᵀ G + 2 λ B Q Qᵀ            G = ∂L/∂W
    ΔW  = s (A' B' - A B) = s (A' - A) B' + s A (B' - B)

The chain rule gives both gradients out of the weight's own, so that the parameters stay a model's:
nothing is merged, W_res is never formed, and where A B is no zero at first the function is what it
was, to the bit. λ ‖B Q‖² is REGLU's: it keeps what B writes off the directions Q.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_optimizer
from jedit.core.checks import FINITE, NOT_NEGATIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.paths import parameter_paths
from jedit.core.precision import HIGHEST
from jedit.curvature.checks import check_has
from jedit.curvature.types import pytree
from jedit.tracing.sites import Weight
from jedit.transforms._arrays import owned, sharded_like, without_frozen


@pytree("weight")
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank part of one parameter.

    Attributes:
        weight: how the parameter is a matrix (layers, d_in, d_out), without a bias.
        a: A (layers, d_in, r).
        b: B (layers, r, d_out).
        off: Q (layers, d_out, k), orthonormal columns that B is kept off; None: there are none.
    """

    weight: Weight
    a: Array
    b: Array
    off: Array | None = None


class TrainAdaptersState(NamedTuple):
    """The adapters as they stand, and the state of their optimizer.

    Attributes:
        adapters: by name.
        inner: the optimizer's state, whose trees are `{name: (A, B)}`.
    """

    adapters: dict[str, Adapter]
    inner: Any


def train_adapters(
    optimizer: optax.GradientTransformation,
    adapters: Mapping[str, Adapter],
    *,
    scale: float = 1.0,
    weight: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Train adapters by an optimizer; it takes gradients of the parameters and returns their steps.

    Stands where the optimizer would; what is put behind it must not change its updates, or the
    adapters in its state are no longer those in the parameters:

        train_adapters(optax.adam(1e-4), {"mlp/kernel": Adapter(block.weight.kernel, a, b)})

    Args:
        optimizer: of A and B, learning rate included.
        adapters: by names of one's own, where A and B begin; all other parameters are frozen. One
            parameter may have several, of disjoint slices of it.
        scale: s, the factor of A B; 1.0 is arbitrary.
        weight: λ, of ‖B Q‖², which is no part of the loss that a loop shows; 0.0, none.

    Returns:
        The transform. Its state holds the adapters; a call of `update` costs 8 d_in d_out r flops a
        matrix. Adapters are as wide as they are given; a narrow parameter rounds each step, so that
        bfloat16 weights want float32 masters.

    Raises:
        ValueError: a number out of its range; no adapters, or of other shapes than their parameter;
            at `update`, the updates lack one.
    """
    check_optimizer(optimizer)
    check_numbers(FINITE, scale=scale)
    check_numbers(NOT_NEGATIVE, weight=weight)
    adapters = dict(adapters)
    if not adapters:
        raise ValueError("there are no adapters to train")
    for name, one in adapters.items():
        w, rank = one.weight, one.a.shape[-1]
        wanted = (w.layers, w.d_in, rank), (w.layers, rank, w.d_out)
        if (one.a.shape, one.b.shape) != wanted:
            raise ValueError(
                f"the adapter {name!r} has A {one.a.shape} and B {one.b.shape}, expected "
                f"{wanted[0]} and {wanted[1]} for {w.path!r}"
            )
        if w.bias_path is not None:
            raise ValueError(
                f"the adapter {name!r} has a bias's row; give it the weight's `kernel`"
            )
        if one.off is not None and (one.off.ndim, *one.off.shape[:2]) != (3, w.layers, w.d_out):
            raise ValueError(
                f"the adapter {name!r} is kept off directions of shape {one.off.shape}, expected "
                f"({w.layers}, {w.d_out}, k)"
            )
    _check_disjoint(adapters)
    inner = optax.with_extra_args_support(optimizer)

    def init(params) -> Any:
        del params  # in nnx.Optimizer's hands they still hold variables
        own = owned(adapters)
        return TrainAdaptersState(own, inner.init(_trained(own)))

    def update(updates, state, params=None, **extra_args) -> Any:
        # What is like the parameters, or asks for them, is nothing like the adapters.
        structure = jax.tree.structure(updates)
        passed = {
            name: extra
            for name, extra in extra_args.items()
            if not callable(extra) and jax.tree.structure(extra) != structure
        }
        now = state.adapters
        found = check_has((one.weight for one in now.values()), updates, "adapters")
        # Of these alone, so that what is computed of them lies on a mesh as they do.
        leaves = {one.weight.path: found[one.weight.path] for one in now.values()}
        gradients = _gradients(now, leaves, scale, weight)
        steps: Any
        steps, after = inner.update(gradients, state.inner, _trained(now), **passed)
        moved = {
            name: dataclasses.replace(one, a=one.a + steps[name][0], b=one.b + steps[name][1])
            for name, one in now.items()
        }
        changes = _changes(now, moved, leaves, scale)
        out = [changes.get(path, jnp.zeros_like(leaf)) for path, leaf in parameter_paths(updates)]
        made = jax.tree.unflatten(jax.tree.structure(updates), out)
        like = without_frozen(updates, params, changes)
        return sharded_like(made, like), TrainAdaptersState(moved, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_disjoint(adapters: Mapping[str, Adapter]) -> None:
    of_path: dict[str, list[Weight]] = {}
    for one in adapters.values():
        of_path.setdefault(one.weight.path, []).append(one.weight)
    for path, weights in of_path.items():
        if len(weights) == 1:
            continue
        ones = (jnp.ones((w.layers, w.d_in, w.d_out), jnp.int8) for w in weights)
        parts = (w.scatter(x)[path] for w, x in zip(weights, ones, strict=True))
        if bool(jnp.any(sum(parts, start=jnp.zeros(weights[0].shape, jnp.int8)) > 1)):
            raise ValueError(f"several adapters of {path!r} overlap; each entry may have one")


def _trained(adapters: Mapping[str, Adapter]) -> dict[str, tuple[Array, Array]]:
    return {name: (one.a, one.b) for name, one in adapters.items()}


@on_auto_axes
def _gradients(
    adapters: Mapping[str, Adapter], leaves: Mapping[str, Array], scale: float, weight: float
) -> dict[str, tuple[Array, Array]]:
    found = {}
    for name, one in adapters.items():
        path = one.weight.path
        g = one.weight.gather({path: leaves[path].astype(one.a.dtype)})
        by_a = scale * _product("lio,lro->lir", g, one.b)
        by_b = scale * _product("lir,lio->lro", one.a, g)
        if one.off is not None:
            written = _product("lro,lok->lrk", one.b, one.off)
            by_b = by_b + 2 * weight * _product("lrk,lok->lro", written, one.off)
        found[name] = by_a, by_b
    return found


@on_auto_axes
def _changes(
    before: Mapping[str, Adapter],
    after: Mapping[str, Adapter],
    leaves: Mapping[str, Array],
    scale: float,
) -> PyTree:
    """Return ΔW by path, without taking the difference of two products."""
    found: dict[str, Array] = {}
    for name, old in before.items():
        new, path = after[name], old.weight.path
        change = _product("lir,lro->lio", new.a - old.a, new.b)
        change = scale * (change + _product("lir,lro->lio", old.a, new.b - old.b))
        part = old.weight.scatter(change)[path].astype(leaves[path].dtype)
        found[path] = found[path] + part if path in found else part
    return found


def _product(form: str, x: Array, y: Array) -> Array:
    return jnp.einsum(form, x, y, precision=HIGHEST)
