"""The software and the machine that a run was made with, as every report states them."""

import os
import platform
import time
from importlib import metadata

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit import __version__


def versions() -> dict[str, str]:
    """Return the versions of Python, of jedit and of what it stands on."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    # jedit may be on the path alone, not installed.
    known = {"python": platform.python_version(), "jedit": __version__}
    return known | {name: metadata.version(name) for name in names}


def machine() -> dict[str, str | int | float]:
    """Return the system, cores, GiB of memory, and the devices as JAX names them."""
    devices = jax.devices()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "memory_gib": round(memory, 1),
        "devices": f"{len(devices)} {devices[0].device_kind}",
    }


def matmul_rate(size: int = 2048, repeats: int = 3) -> float:
    """Return the flops a second of a float32 matrix product of this size, right now."""
    x = jnp.ones((size, size), jnp.float32)
    jax.block_until_ready(_product(x))
    begin = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(_product(x))
    return 2 * size**3 * repeats / (time.perf_counter() - begin)


@jax.jit
def _product(x: Array) -> Array:
    return x @ x
