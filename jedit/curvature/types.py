"""What a curvature is: one block per parameter matrix, with its factors and eigenbases.

A block is a Kronecker product of two symmetric factors, optionally with corrected eigenvalues
(EK-FAC), or a diagonal.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jedit.core.checks import is_known
from jedit.core.devices import fetched
from jedit.core.display import html_table, short_repr, text_table
from jedit.curvature.mesh.placement import along, best_split, num_pieces, without
from jedit.tracing import Weight

# What becomes of parameters that a curvature, or a projector, does not cover.
Uncovered = Literal["zero", "identity"]
HIGHEST = jax.lax.Precision.HIGHEST


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


@pytree()
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

    __repr__ = short_repr

    def rotate(self, x: Array, axis: int, *, back: bool = False) -> Array:
        """Qᵀ (or Q, back) along an axis of (layers, d_in, d_out)."""
        if self.basis is None:
            return x
        basis = fetched(self.basis)
        # Contracted as it lies: a transposed basis would be a copy of it.
        q = "lai" if back else "lia"
        spec = f"{q},lij->laj" if axis == 1 else f"{q},lji->lja"
        return jnp.einsum(spec, basis, x, precision=HIGHEST)


@pytree("weight", "input", "output", "sharding")
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """A ⊗ G of one parameter matrix.

    Attributes:
        weight: which parameters it is, and how they form a matrix.
        input: name of the factor A in `Curvature.factors`; blocks reading one activation share it.
        output: name of the factor G.
        corrected: (layers, rows, d_out) EK-FAC eigenvalues, or None for the products a_i g_j.
        sharding: how the parameter's matrix (layers, d_in, d_out) lies on a mesh; None: one device.
    """

    weight: Weight
    input: str
    output: str
    corrected: Array | None = None
    sharding: NamedSharding | None = None

    __repr__ = short_repr


@pytree("weight")
@dataclasses.dataclass(frozen=True)
class Diagonal:
    """The diagonal of one parameter matrix's block: (layers, rows, d_out)."""

    weight: Weight
    values: Array

    __repr__ = short_repr


def check_counted(num_outputs: Array, name: str = "the curvature") -> None:
    """Refuse a mean over no output: it protects nothing, and names nothing to be forgotten.

    Raises:
        ValueError: nothing was counted.
    """
    if is_known(num_outputs) and not np.all(np.asarray(num_outputs) > 0):
        raise ValueError(
            f"{name} is of no outputs: its batches have no rows, or mask and valid leave out all"
        )


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
        """Paths of the parameters it covers."""
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
                bases = (self.factors[f].basis for f in (block.input, block.output))
                a, g = ("dense" if basis is not None else "diagonal" for basis in bases)
                kinds = (a, g, "products" if block.corrected is None else "corrected")
            rows.append((name + bias, f"{layers}{weight.rows} x {weight.d_out}", *kinds))
        return rows


def joined(curvatures: Sequence[Curvature]) -> Curvature:
    """One curvature of several that cover different parameters, taken over the same data."""
    blocks, factors = {}, {}
    for curvature in curvatures:
        blocks |= curvature.blocks
        factors |= curvature.factors
    return Curvature(blocks, factors, curvatures[0].num_outputs)


def off_axes(curvature: Curvature, axes: tuple[str, ...]) -> Curvature:
    """The curvature for use where something else is split over these axes of its mesh."""
    placed = block_shardings(curvature)
    return with_shardings(curvature, {name: without(x, axes) for name, x in placed.items()})


def block_shardings(curvature: Curvature) -> dict[str, NamedSharding]:
    """How the blocks' matrices lie, of those that are on a mesh."""
    found = {n: b.sharding for n, b in curvature.blocks.items() if isinstance(b, Kronecker)}
    return {name: sharding for name, sharding in found.items() if sharding is not None}


def with_shardings(
    curvature: Curvature, shardings: Mapping[str, NamedSharding | None]
) -> Curvature:
    """The curvature with other statements of how its blocks' matrices lie; None where unnamed."""
    blocks = {
        name: dataclasses.replace(b, sharding=shardings.get(name))
        if isinstance(b, Kronecker)
        else b
        for name, b in curvature.blocks.items()
    }
    return Curvature(blocks, curvature.factors, curvature.num_outputs)


def eigenvalues(curvature: Curvature, name: str) -> Array:
    """A block's eigenvalues (layers, rows, d_out), in the order of its eigenbasis."""
    block = curvature.blocks[name]
    if isinstance(block, Diagonal):
        return block.values
    if block.corrected is not None:
        return fetched(block.corrected)
    a = curvature.factors[block.input].eigenvalues
    g = curvature.factors[block.output].eigenvalues
    if block.sharding is not None:
        return _sharded_products(a, g, block.sharding)
    return a[:, :, None] * g[:, None, :]


@functools.partial(jax.jit, static_argnums=2)
def _sharded_products(a: Array, g: Array, sharding: NamedSharding) -> Array:
    products = a[:, :, None] * g[:, None, :]
    return with_sharding_constraint(products, best_split(sharding, products.shape))


def rotate(curvature: Curvature, name: str, matrix: Array, *, back: bool = False) -> Array:
    """Into a block's eigenbasis (or back) for (layers, rows, d_out)."""
    block = curvature.blocks[name]
    if isinstance(block, Diagonal):
        return matrix
    factors = (curvature.factors[block.input], curvature.factors[block.output])
    if block.sharding is not None:
        return _sharded_rotation(*factors, matrix, back, block.sharding)
    matrix = factors[0].rotate(matrix, 1, back=back)
    return factors[1].rotate(matrix, 2, back=back)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _sharded_rotation(
    a: Factor, g: Factor, matrix: Array, back: bool, sharding: NamedSharding
) -> Array:
    """Each axis is rotated while the matrix is split along the other: no device holds all of it.

    Left to itself, a sharded contraction makes partial sums of the whole matrix on every device.
    Zeros make both axes even: XLA moves only even pieces from one device to another. Layers that
    are not split go one by one, so that one layer's bases are whole on a device at a time.
    """
    shape = matrix.shape
    missing = [(0, -n % num_pieces(sharding)) for n in shape[1:]]
    matrix = jnp.pad(matrix, [(0, 0), *missing])
    layers = PartitionSpec(sharding.spec[0])
    bases = tuple(
        None if f.basis is None else jnp.pad(fetched(f.basis), [(0, 0), pad, pad])
        for f, pad in zip((a, g), missing, strict=True)
    )

    def rotated(given):
        matrix, bases = given
        for basis, axis, other in zip(bases, (1, 2), (2, 1), strict=True):
            matrix = with_sharding_constraint(matrix, along(sharding, other))
            if basis is not None:
                basis = with_sharding_constraint(basis, NamedSharding(sharding.mesh, layers))
                matrix = Factor(basis, basis, basis).rotate(matrix, axis, back=back)
            matrix = with_sharding_constraint(matrix, along(sharding, other))
            matrix = with_sharding_constraint(matrix, sharding)
        return matrix

    if sharding.spec[0] is None and shape[0] > 1:
        one_by_one = jax.tree.map(lambda x: x[:, None], (matrix, bases))
        matrix = jax.lax.map(rotated, one_by_one)[:, 0]
    else:
        matrix = rotated((matrix, bases))
    place = best_split(sharding, shape)
    matrix = with_sharding_constraint(matrix, place)[:, : shape[1], : shape[2]]
    return with_sharding_constraint(matrix, place)


def gather(block: Kronecker | Diagonal, leaves: Mapping[str, Array]) -> Array:
    """A block's matrix (layers, rows, d_out) out of `{path: array}`, on a mesh in pieces."""
    sharding = block.sharding if isinstance(block, Kronecker) else None
    if sharding is None or block.weight.bias_path is None:
        return block.weight.gather(leaves)
    return _sharded_gather(dict(leaves), block.weight, sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sharded_gather(leaves: dict[str, Array], weight: Weight, sharding: NamedSharding) -> Array:
    """The bias's row is put below a matrix that is split by columns: no row has to move."""
    parts = [
        with_sharding_constraint(part.gather(leaves), along(sharding, 2))
        for part in (weight.kernel, weight.bias_row)
    ]
    whole_matrix = jnp.concatenate(parts, axis=1)
    return with_sharding_constraint(whole_matrix, best_split(sharding, whole_matrix.shape))
