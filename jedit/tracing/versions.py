"""What differs between the supported JAX versions: names of primitives and how equations are bound.

Tried on the oldest and on the newest supported JAX; nothing else in this folder asks for a version.
"""

import jax
from jax.extend import core as jex_core

CALL = ("jit", "pjit", "closed_call", "core_call")
REMAT = ("remat", "remat2", "checkpoint")
INLINED = (*CALL, *REMAT)
CUSTOM_RULE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin")
NO_GRADIENT = ("stop_gradient",)
RAGGED = ("ragged_dot", "ragged_dot_general")
CAST = ("convert_element_type", "reduce_precision")
IDENTITY = (
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reshard",
    "sharding_constraint",
)


def inner_jaxprs(eqn) -> list[jex_core.ClosedJaxpr]:
    """Return the jaxprs in an equation's parameters, closed."""
    found = []
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, jex_core.ClosedJaxpr):
                found.append(x)
            elif isinstance(x, jex_core.Jaxpr):
                found.append(jex_core.ClosedJaxpr(x, ()))
    return found


def rebind(eqn, inputs: list) -> list:
    """Evaluate one equation on other inputs, its custom derivative rules and context kept.

    Raises:
        RuntimeError: a JAX of later date re-binds equations in a way not known here.
    """
    bound = eqn.primitive.get_bind_params(eqn.params)
    # In the context that the equation was traced in: mesh, precision and x64 are read off it.
    with eqn.ctx.manager:
        if isinstance(bound, dict):  # jax >= 0.10
            outs = eqn.primitive.bind(*inputs, **bound)
        elif isinstance(bound, tuple) and len(bound) == 2:  # a pair (functions, parameters)
            outs = eqn.primitive.bind(*bound[0], *inputs, **bound[1])
        else:
            raise RuntimeError(
                f"jax {jax.__version__} re-binds `{eqn.primitive.name}` in a way this version of "
                "jedit does not know; jedit supports jax >= 0.10"
            )
    return list(outs) if eqn.primitive.multiple_results else [outs]


def scan_layout(eqn) -> tuple[int, int]:
    """Return how many constants and how many carried values lead a scan's operands."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()  # jax >= 0.12
    return len(list(consts)), len(list(carry))
