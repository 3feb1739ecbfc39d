"""The minor part of hidden states: what is left of them off some directions (MCU).

    z = h - Q Qᵀ h

    h   hidden state, features on the last axis           `hidden`
    Q   orthonormal directions, the dominant ones         `directions`

It stands where an objective takes `hidden`, which then neither sees nor moves what lies along Q:
`RMU(MinorPart(hidden, Q))`. `jedit.methods.mcu` makes Q.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jedit.core.checks import check_finite
from jedit.core.precision import HIGHEST, wide
from jedit.objectives.hidden_states import Hidden


class MinorPart:
    """A hidden state without its part along some directions.

    Equal by value, so that equal ones compile once; the directions are constants of the program.
    """

    def __init__(self, hidden: Hidden, directions: Float[ArrayLike, "width k"]):
        """Take what is to be looked at, and what of it is left out.

        Args:
            hidden: `(apply, params, inputs) -> states`, hashable, such as `jedit.tracing.Leaving`.
            directions: Q, orthonormal columns.

        Raises:
            ValueError: the columns are not orthonormal, to a thousandth.
            FloatingPointError: they are not finite.
        """
        self.hidden = hidden
        self.directions = np.array(directions)
        self.directions.setflags(write=False)
        check_finite("the directions", self.directions)
        wide = self.directions.astype(np.float64)
        if wide.ndim != 2 or np.abs(wide.T @ wide - np.eye(wide.shape[1])).max(initial=0) > 1e-3:
            raise ValueError(
                f"directions must be orthonormal columns, got an array {wide.shape} whose columns' "
                "inner products are not 0 and 1"
            )
        self._value = (hidden, wide.shape, self.directions.tobytes())

    def __call__(
        self, apply: Callable, params: PyTree, inputs: PyTree
    ) -> Float[Array, "batch *lead width"]:
        """Return the states' minor part, in float32 or wider; costs 4 k flops a feature.

        Raises:
            ValueError: the states are not as wide as the directions are long.
        """
        states = self.hidden(apply, params, inputs)
        if states.shape[-1] != len(self.directions):
            raise ValueError(
                f"the states are {states.shape[-1]} wide, the directions {len(self.directions)}"
            )
        # Wide, since of a mean that outweighs the rest a rounded Q would leave more than the rest.
        h = wide(states)
        q = jnp.asarray(self.directions).astype(h.dtype)
        along = jnp.einsum("...d,dk->...k", h, q, precision=HIGHEST)
        return h - jnp.einsum("...k,dk->...d", along, q, precision=HIGHEST)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MinorPart) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return f"MinorPart({self.hidden!r}, off {self.directions.shape[1]} directions)"
