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
            # Integer leaves stand beside what is trained; the loop leaves them out.
            return jax.grad(
                lambda p: self.held(apply, p, forget, retain, reference)[0], allow_int=True
            )(params)

        return {"retain_grad_fn": retain_grad_fn}
