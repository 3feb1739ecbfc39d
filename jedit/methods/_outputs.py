"""Second moments of matrices' outputs on two sets, out of those of their inputs: Wᵀ A W."""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind
from jedit.core.devices import fetched
from jedit.core.precision import HIGHEST
from jedit.curvature import Curvature
from jedit.curvature.checks import check_layers_finite, matrix_of
from jedit.curvature.types import Kronecker
from jedit.methods._two_sets import comparable
from jedit.tracing.sites import Weight


class Served(NamedTuple):
    """One matrix, and the moments of what enters it in the target and in the rest.

    Attributes:
        weight: how its parameters form it; the bias, where there is one, is its last row.
        matrix: W (layers, rows, d_out), in the moments' dtype.
        target: A (layers, rows, rows) of the target's inputs.
        rest: A of the rest's.
    """

    weight: Weight
    matrix: Array
    target: Array
    rest: Array

    def outputs(self, inputs: Array) -> Float[Array, "layers d_out d_out"]:
        """Return the second moment of the outputs, bias and all, of inputs with this moment."""
        found = jnp.einsum("lio,lij,ljp->lop", self.matrix, inputs, self.matrix, precision=HIGHEST)
        return (found + jnp.swapaxes(found, 1, 2)) / 2  # rounding is not symmetric

    def output_squares(self, inputs: Array) -> Float[Array, "layers d_out"]:
        """Return that moment's diagonal alone, of a vocabulary's outputs as well."""
        entered = jnp.einsum("lij,ljo->lio", inputs, self.matrix, precision=HIGHEST)
        return jnp.sum(self.matrix * entered, axis=1)


def served_matrices(
    params: PyTree, target: Curvature, rest: Curvature, method: str
) -> Iterator[tuple[str, Served]]:
    """Yield the matrices with dense input moments of two sets, one at a time, with their blocks.

    Tables that are looked up in, vectors, and inputs too long for a dense factor are left out.

    Args:
        params: the parameters.
        target: curvature of the rows to be forgotten.
        rest: curvature of the rows to be kept, of the same sites.
        method: name of the method, for messages.

    Raises:
        TypeError: an argument that holds no parameters or curvature.
        ValueError: curvatures of different sites or of no outputs, a parameter that is used at
            several sites, no such matrix, or a trace.
        FloatingPointError: a moment is not finite.
    """
    for given, name in ((target, "target"), (rest, "rest")):
        check_kind(given, Curvature, name, "as jedit.estimate returns it")
    _, _, blocks, leaves = comparable(params, target, rest, method)
    dense = {n: b for n, b in blocks.items() if matrix_of(target.factors[b.input], n).ndim == 3}
    if not dense:
        raise ValueError(f"{method} needs a matrix whose inputs have a dense moment; there is none")
    for name, block in dense.items():
        other = rest.blocks[name]
        assert isinstance(other, Kronecker)
        # Here and not before: offloaded moments come one by one.
        moments = [
            fetched(matrix_of(curvature.factors[one.input], name))
            for curvature, one in ((target, block), (rest, other))
        ]
        for moment in moments:
            check_layers_finite(moment, name)
        dtype = moments[0].dtype
        matrix = block.weight.gather({p: leaves[p].astype(dtype) for p in block.weight.paths})
        yield name, Served(block.weight, matrix, *moments)


def kernel_of(served: Served) -> tuple[Weight, Array]:
    """Return the matrix without its bias's row, and how it stands in its parameter."""
    weight = served.weight.kernel
    return weight, served.matrix[:, : weight.d_in]
