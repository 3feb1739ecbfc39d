"""Threads enough for the interpreter."""

import os

from jedit_kernels.choice import is_jax_new_enough

# The six threads of a cluster wait for one another inside XLA's thread pool, which has
# as many threads as there are cores, or as this says when JAX first computes: with fewer than they
# need they would wait for ever.
if is_jax_new_enough():
    os.environ.setdefault("NPROC", "8")
