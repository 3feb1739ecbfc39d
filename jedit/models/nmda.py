"""The NMDA-inspired activation (Kim et al., NeurIPS 2023).

    NMDA_α(x) = x sigmoid(β x - log α) = x / (1 + α exp(-β x))

    α   magnesium's concentration: how long the gate stays shut; 1 with β = 1 is SiLU, 0 is linear
    β   how steep the gate is

"Transformer as a hippocampal memory consolidation model based on NMDAR-inspired nonlinearity"
stands it between the kernels of a transformer's perceptrons; α of 10 gave the best reference memory
[notes]; formula, and the identity at α = 0, which is the formula's own value there [code read].
"""

import dataclasses
import math

import jax
from jaxtyping import Array

from jedit.core.checks import NOT_NEGATIVE, POSITIVE, check_numbers


@dataclasses.dataclass(frozen=True)
class NMDA:
    """The activation x / (1 + α exp(-β x)), a value: equal ones compile once.

        apply, params = gpt(..., mlp=NMDA(alpha=10.0))

    Attributes:
        alpha: α; 1 is the released code's.
        beta: β; 1 is the released code's.
    """

    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(NOT_NEGATIVE, alpha=self.alpha)
        check_numbers(POSITIVE, beta=self.beta)

    def __call__(self, x: Array) -> Array:
        """Return the activation of every entry, in its dtype."""
        if self.alpha == 0:
            return x
        # A sigmoid: the exponential overflows where the gate is shut, and its gradient is NaN.
        return x * jax.nn.sigmoid(self.beta * x - math.log(self.alpha))
