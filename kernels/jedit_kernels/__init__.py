"""Fused kernels for the products that XLA does badly; imports nothing from jedit.

Each operation is a folder: what it computes in plain JAX (`reference`), how XLA is made to do it
well (`xla`), and a kernel for NVIDIA's Hopper (`mosaic`). README.md beside this folder says more.
"""

from jedit_kernels.moment import moment
from jedit_kernels.squared_gradient_sum import squared_gradient_sum

__all__ = ["moment", "squared_gradient_sum"]
