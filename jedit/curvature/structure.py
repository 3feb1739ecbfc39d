"""What a curvature is: one block per parameter matrix, with its factors and eigenbases.

A block is a Kronecker product of two symmetric factors, optionally with corrected eigenvalues
(EK-FAC), or a diagonal.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit.capture import Weight

HIGHEST = jax.lax.Precision.HIGHEST


Class = TypeVar("Class", bound=type)


def _pytree(*meta: str) -> Callable[[Class], Class]:
    """Register a frozen dataclass whose fields `meta` are static."""

    def register(cls: Class) -> Class:
        fields = [f.name for f in dataclasses.fields(cls) if f.name not in meta]
        return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=list(meta))

    return register


@_pytree()
@dataclasses.dataclass(frozen=True)
class Factor:
    """A symmetric positive semi-definite matrix per layer, with its eigenbasis; or a diagonal one.

    Attributes:
        matrix: (layers, d, d), or (layers, d) for a diagonal factor.
        basis: (layers, d, d), eigenvectors in columns; None for a diagonal factor.
        eigenvalues: (layers, d), ascending, never negative; in place for a diagonal factor.
    """

    matrix: Array
    basis: Array | None
    eigenvalues: Array

    def rotate(self, x: Array, axis: int, *, back: bool = False) -> Array:
        """Qᵀ (or Q, back) along an axis of (layers, d_in, d_out)."""
        if self.basis is None:
            return x
        q = jnp.swapaxes(self.basis, 1, 2) if back else self.basis
        spec = "lia,lij->laj" if axis == 1 else "lja,lij->lia"
        return jnp.einsum(spec, q, x, precision=HIGHEST)


@_pytree("weight", "input", "output")
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """A ⊗ G of one parameter matrix.

    Attributes:
        weight: which parameters it is, and how they form a matrix.
        input: name of the factor A in `Curvature.factors`; blocks reading one activation share it.
        output: name of the factor G.
        corrected: (layers, rows, d_out) EK-FAC eigenvalues, or None for the products a_i g_j.
    """

    weight: Weight
    input: str
    output: str
    corrected: Array | None = None


@_pytree("weight")
@dataclasses.dataclass(frozen=True)
class Diagonal:
    """The diagonal of one parameter matrix's block: (layers, rows, d_out)."""

    weight: Weight
    values: Array


@_pytree()
@dataclasses.dataclass(frozen=True)
class Curvature:
    """A positive semi-definite approximation of the Gauss-Newton matrix of the mean output loss.

    Attributes:
        blocks: by parameter path (with "#k" for a further, disjoint slice of one leaf).
        factors: the Kronecker factors, by name.
        num_outputs: M, the outputs it is a mean over.
    """

    blocks: dict[str, Kronecker | Diagonal]
    factors: dict[str, Factor]
    num_outputs: Array

    @property
    def covered(self) -> tuple[str, ...]:
        """Paths of the parameters it covers."""
        return tuple(dict.fromkeys(p for b in self.blocks.values() for p in b.weight.paths))

    def __str__(self) -> str:
        rows = [("block", "matrix", "A", "G", "eigenvalues")]
        for name, block in self.blocks.items():
            weight = block.weight
            bias = f" + {weight.bias_path}" if weight.bias_path else ""
            layers = f"{weight.layers} x " if weight.is_stacked else ""
            kinds = ("-", "-", "diagonal block")
            if isinstance(block, Kronecker):
                bases = (self.factors[f].basis for f in (block.input, block.output))
                a, g = ("dense" if basis is not None else "diagonal" for basis in bases)
                kinds = (a, g, "products" if block.corrected is None else "corrected")
            rows.append((name + bias, f"{layers}{weight.rows} x {weight.d_out}", *kinds))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)

    __repr__ = __str__


def eigenvalues(curvature: Curvature, name: str) -> Array:
    """A block's eigenvalues (layers, rows, d_out), in the order of its eigenbasis."""
    block = curvature.blocks[name]
    if isinstance(block, Diagonal):
        return block.values
    if block.corrected is not None:
        return block.corrected
    a = curvature.factors[block.input].eigenvalues
    g = curvature.factors[block.output].eigenvalues
    return a[:, :, None] * g[:, None, :]


def rotate(curvature: Curvature, name: str, matrix: Array, *, back: bool = False) -> Array:
    """Into a block's eigenbasis (or back) for (layers, rows, d_out)."""
    block = curvature.blocks[name]
    if isinstance(block, Diagonal):
        return matrix
    matrix = curvature.factors[block.input].rotate(matrix, 1, back=back)
    return curvature.factors[block.output].rotate(matrix, 2, back=back)
