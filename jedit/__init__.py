"""jedit erases and rewrites what a trained network knows, as pure JAX functions."""

__version__ = "0.1.0"
