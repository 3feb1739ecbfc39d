"""Gradient transformations for optax, one file each."""
