"""What a curvature is: one block per parameter matrix, with its factors and eigenbases.

A block is a Kronecker product of two symmetric factors, optionally with corrected eigenvalues
(EK-FAC), or a diagonal.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from jedit.core.display import html_table, short_repr, text_table
from jedit.tracing.sites import Weight

# What becomes of parameters that a curvature, or a projector, does not cover.
Uncovered = Literal["zero", "identity"]


Class = TypeVar("Class", bound=type)


def pytree(*static: str) -> Callable[[Class], Class]:
    """Make a frozen dataclass a pytree whose fields `static` are not leaves.

    Its leaves may be anything that JAX puts there (shapes, shardings, batch axes), so an instance
    is rebuilt without `__init__`, which expects arrays.
    """

    def register(cls: Class) -> Class:
        names = [field.name for field in dataclasses.fields(cls) if field.name not in static]

        def flatten(x):
            leaves = [(jax.tree_util.GetAttrKey(name), getattr(x, name)) for name in names]
            return leaves, tuple(getattr(x, name) for name in static)

        def unflatten(fixed, leaves):
            x = object.__new__(cls)
            for name, value in (*zip(static, fixed, strict=True), *zip(names, leaves, strict=True)):
                object.__setattr__(x, name, value)
            return x

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register


# How the matrix of a dense factor is taken apart, and by what a damped one is inverted.
By = Literal["eigh", "cholesky", "inverse"]


@pytree("by")
@dataclasses.dataclass(frozen=True)
class Factor:
    """A symmetric positive semi-definite matrix per layer, in one of four forms.

    | form | matrix | basis | eigenvalues |
    | --- | --- | --- | --- |
    | "diagonal" | (layers, d) | None | the matrix |
    | "eigenbasis" | (layers, d, d) | (layers, d, d) | (layers, d) |
    | "leading" | None | (layers, d, k), k < d | (layers, 1 + k) |
    | "undecomposed" | (layers, d, d) | None | None |

    Attributes:
        matrix: the matrix itself; a "leading" factor keeps none.
        basis: eigenvectors in columns.
        eigenvalues: ascending (in place for a diagonal factor), never negative. A "leading" factor
            has the mean of the d - k that have no eigenvector first.
        by: static; by what an "undecomposed" one is inverted: "cholesky" or "inverse".
    """

    matrix: Array | None
    basis: Array | None
    eigenvalues: Array | None
    by: By = "eigh"

    __repr__ = short_repr

    @property
    def form(self) -> Literal["diagonal", "eigenbasis", "leading", "undecomposed"]:
        """Return which of the four it is."""
        if self.matrix is None:
            return "leading"
        if self.eigenvalues is None:
            return "undecomposed"
        return "diagonal" if self.basis is None else "eigenbasis"

    @property
    def dimension(self) -> int:
        """Return d, the side of the matrix."""
        if self.matrix is not None:
            return self.matrix.shape[-1]
        assert self.basis is not None  # a "leading" factor is its basis
        return self.basis.shape[1]


@pytree("weight", "input", "output", "sharding", "is_merged")
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """The Kronecker product A ⊗ G that stands for one parameter matrix's block.

    Attributes:
        weight: which parameters it is, and how they form a matrix.
        input: name of the factor A in `Curvature.factors`; blocks reading one activation share it.
        output: name of the factor G.
        corrected: (layers, rows, d_out) EK-FAC eigenvalues, or None for the products a_i g_j. Along
            an axis with k leading eigenvectors there are 1 + k, as the factor has.
        sharding: how the parameter's matrix (layers, d_in, d_out) lies on a mesh; None: one device.
        is_merged: whether A and G are those of several sites, put together with weights.
    """

    weight: Weight
    input: str
    output: str
    corrected: Array | None = None
    sharding: NamedSharding | None = None
    is_merged: bool = False

    __repr__ = short_repr


@pytree("weight")
@dataclasses.dataclass(frozen=True)
class Diagonal:
    """The diagonal of one parameter matrix's block: (layers, rows, d_out)."""

    weight: Weight
    values: Array

    __repr__ = short_repr


@pytree()
@dataclasses.dataclass(frozen=True)
class Curvature:
    """A positive semi-definite approximation of the Gauss-Newton matrix of the mean output loss.

    Attributes:
        blocks: by parameter path (with "#k" for a further, disjoint slice of one leaf).
        factors: the Kronecker factors, by name.
        num_outputs: M, the outputs it is a mean over.
    """

    blocks: Mapping[str, Kronecker | Diagonal]
    factors: Mapping[str, Factor]
    num_outputs: Array

    @property
    def covered(self) -> tuple[str, ...]:
        """Return paths of the parameters it covers."""
        return tuple(dict.fromkeys(p for b in self.blocks.values() for p in b.weight.paths))

    def __str__(self) -> str:
        return text_table(self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("block", "matrix", "A", "G", "eigenvalues")]
        for name, block in self.blocks.items():
            weight = block.weight
            bias = f" + {weight.bias_path}" if weight.bias_path else ""
            layers = f"{weight.layers} x " if weight.is_stacked else ""
            kinds = ("-", "-", "diagonal block")
            if isinstance(block, Kronecker):
                a, g = (_told(self.factors[f]) for f in (block.input, block.output))
                kinds = (a, g, "products" if block.corrected is None else "corrected")
            rows.append((name + bias, f"{layers}{weight.rows} x {weight.d_out}", *kinds))
        return rows


def _told(factor: Factor) -> str:
    """Return a few words on a factor's form."""
    if factor.form == "leading":
        # JAX puts None in the place of arrays, where a tree's structure is all that is meant.
        return "-" if factor.basis is None else f"{factor.basis.shape[-1]} of {factor.dimension}"
    return {"eigenbasis": "dense", "undecomposed": f"dense, {factor.by}"}.get(
        factor.form, factor.form
    )
