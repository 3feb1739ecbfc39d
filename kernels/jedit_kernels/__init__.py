"""Fused kernels for the products that XLA does badly; imports nothing from jedit."""
