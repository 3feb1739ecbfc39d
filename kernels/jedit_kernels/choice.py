"""Which implementation of an operation runs, and what the Hopper kernels take."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array

IMPLEMENTATIONS = ("xla", "mosaic")
# The kernels are tested from here on; earlier versions interpret and lower only part of them.
OLDEST_JAX = (0, 12)
NARROW = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def choose(implementation: str | None, faster_on: frozenset[str], *operands: Array) -> str:
    """Return the implementation that a wrapper takes.

    Args:
        implementation: "xla", "mosaic", or None: the kernel where it has been measured faster.
        faster_on: compute capabilities ("9.0") where it has.
        operands: what the kernel would multiply; None takes it only for dtypes that it takes.

    Returns:
        "xla" or "mosaic".

    Raises:
        ValueError: `implementation` is any other name.
    """
    if implementation is None:
        is_possible = is_jax_new_enough() and _are_narrow(operands)
        return "mosaic" if is_possible and _capability(faster_on) in faster_on else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'implementation must be None, "xla" or "mosaic", got {implementation!r}')
    return implementation


def is_jax_new_enough() -> bool:
    """Say whether the installed JAX is one that the kernels are tested on."""
    return tuple(jax.__version_info__[:2]) >= OLDEST_JAX


def check_mosaic(name: str, **operands: Array) -> None:
    """Refuse what the Hopper kernels cannot do.

    Raises:
        ValueError: a JAX that is too old, or operands that are not all bfloat16 or all float16.
    """
    if not is_jax_new_enough():
        oldest = ".".join(map(str, OLDEST_JAX))
        raise ValueError(
            f'{name} with implementation="mosaic" needs jax >= {oldest}, this is jax '
            f'{jax.__version__}; use implementation="xla"'
        )
    if not _are_narrow(operands.values()):
        got = ", ".join(f"{key} in {operand.dtype}" for key, operand in operands.items())
        raise ValueError(
            f'{name} with implementation="mosaic" takes operands all in bfloat16 or all in '
            f"float16, got {got}: Hopper's tensor cores would round wider ones to 10 bits; cast "
            'them, or use implementation="xla"'
        )


def _are_narrow(operands: Iterable[Array]) -> bool:
    """Say whether all are bfloat16 or all float16."""
    dtypes = {operand.dtype for operand in operands}
    return len(dtypes) == 1 and dtypes <= set(NARROW)


def _capability(faster_on: frozenset[str]) -> str:
    """Return the default device's compute capability.

    It is "" where nothing depends on it, or off a GPU.
    """
    if not faster_on or jax.default_backend() != "gpu":
        return ""
    return str(getattr(jax.devices()[0], "compute_capability", ""))
