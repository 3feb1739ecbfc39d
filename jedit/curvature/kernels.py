"""The one door to `jedit_kernels`: the products that an estimation pass spends its time on."""

from jedit_kernels import moment, squared_gradient_sum

__all__ = ["moment", "squared_gradient_sum"]
