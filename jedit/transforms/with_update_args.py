"""Give a transform its further arguments where the loop around it has no place for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jaxtyping import PyTree

from jedit.transforms._arrays import owned


class WithUpdateArgsState(NamedTuple):
    """The inner transform's state, and the data that its arguments are made of.

    Attributes:
        inner: the state of the inner transform.
        data: a copy in the state, so that it is an argument of the jitted step and not a constant.
    """

    inner: PyTree
    data: tuple[PyTree, ...]


def with_update_args(
    transform: optax.GradientTransformation, update_args: Callable[..., dict], *data: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Compute a transform's extra arguments from the parameters, at each update.

    For loops that call `update(gradients, state, params)` and nothing else: Flax's `TrainState`,
    tunix's trainer.

        def retain_grads(params, retain):
            return {"retain_grads": jax.grad(retain_loss)(params, retain)}

        optax.chain(
            optax.adamw(1e-4), with_update_args(orthogonalize_to_retain(), retain_grads, retain)
        )

    Args:
        transform: any optax transform, or chain.
        update_args: `(params, *data) -> dict` of extra arguments; one of the same name that the
            loop gives is replaced.
        *data: what it needs besides: arrays, in any trees.

    Returns:
        The transform; a call of `update` costs what `update_args` does.

    Raises:
        ValueError: at `update`, params are missing.
    """
    inner = optax.with_extra_args_support(transform)

    def init(params) -> Any:
        return WithUpdateArgsState(inner.init(params), owned(data))

    def update(updates, state, params=None, **extra_args) -> Any:
        if params is None:
            raise ValueError("with_update_args needs params: optimizer.update(g, state, params)")
        made = update_args(params, *state.data)
        updates, after = inner.update(updates, state.inner, params, **{**extra_args, **made})
        return updates, WithUpdateArgsState(after, state.data)

    return optax.GradientTransformationExtraArgs(init, update)
