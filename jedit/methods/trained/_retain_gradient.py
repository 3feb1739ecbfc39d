"""The retain gradient, where an update is projected off it."""

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import PyTree

from jedit.objectives import Objective


@dataclasses.dataclass(frozen=True)
class RetainGradient:
    """The argument that the projection needs: the gradient of what is held, as a function."""

    held: Objective

    def __call__(
        self, apply: Callable, params: PyTree, forget: PyTree, retain: PyTree, reference: PyTree
    ) -> dict[str, Callable]:
        del params  # the projection asks where it stands

        def retain_grad_fn(params: PyTree) -> PyTree:
            return jax.grad(lambda p: self.held(apply, p, forget, retain, reference), has_aux=True)(
                params
            )[0]

        return {"retain_grad_fn": retain_grad_fn}
