"""The diagonal of the Gauss-Newton matrix of the mean loss, out of squared per-example gradients.

    Λ = (1/M) Σ_n [ Q_Aᵀ ∇_W ℓ_n Q_G ]²

ℓ_n the sum over example n's unmasked outputs, M the number of all, and Q = 1. With K-FAC's
eigenbases for Q it is EK-FAC's spectrum, so one estimator serves both (`squares_estimator`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_function
from jedit.core.batch import Batch
from jedit.core.display import short_repr
from jedit.core.paths import exactly
from jedit.curvature.captured_batch import (
    Examples,
    Fisher,
    Labels,
    check_pass,
    over_row_blocks,
    run_pass,
)
from jedit.curvature.checks import check_counted, check_layers_finite
from jedit.curvature.estimator import Estimator
from jedit.curvature.layout import BlockSites, group_sites, padding_hint
from jedit.curvature.leading_squares import add_leading_squares
from jedit.curvature.likelihoods import Likelihood
from jedit.curvature.low_rank import has_rest, num_values
from jedit.curvature.memory import Footprint, device_bytes, group_paths
from jedit.curvature.mesh.placement import (
    best_split,
    leaf_shardings,
    matrix_sharding,
    undivided,
    zeros,
)
from jedit.curvature.squared_gradients import add_squared_gradients
from jedit.curvature.types import Curvature, Diagonal, pytree

NO_BASES = (None, None)


@pytree("blocks", "draws")
@dataclasses.dataclass(frozen=True)
class SquaresState:
    """Sums of squared gradients over batches; states of disjoint data merge by adding leaves.

    Attributes:
        squares: by block, the sum of squared per-example gradients (layers, rows, d_out); 1 + k
            long where k eigenvectors are known.
        num_outputs: M, the number of outputs that counted, int32.
        next_example: the running example number, int32; a sum of states has one beyond all theirs.
        blocks: static; the parameters and sites of each block.
        draws: static; how many pullbacks a batch's gradients are the mean of.
    """

    squares: dict[str, Array]
    num_outputs: Array
    next_example: Array
    blocks: tuple[BlockSites, ...]
    draws: int

    __repr__ = short_repr

    def places(self, params: PyTree) -> "SquaresState | None":
        """Return the shardings of all sums, after those of the parameters; None on one device."""
        leaves = leaf_shardings(params)
        if not leaves:
            return None
        found = undivided(self, leaves)
        for block in self.blocks:
            matrix = matrix_sharding(block.weight, leaves)
            if matrix is not None:
                found.squares[block.name] = best_split(matrix, self.squares[block.name].shape)
        return found


def diagonal(
    apply: Callable,
    likelihood: Likelihood,
    *,
    select: str | Sequence[str] | None = None,
    fisher: Fisher = "sampled",
    samples: int = 1,
) -> Estimator:
    """Return the diagonal of the Gauss-Newton matrix of the mean loss.

    Arguments and errors are as `kfac`'s.

    A pass costs one forward, one activation-backward pass and the per-example gradients, d_in d_out
    multiply-adds a position and site.
    """

    def finish(blocks, means, num_outputs):
        diagonals = {b.name: Diagonal(b.weight, means[b.name]) for b in blocks}
        return Curvature(diagonals, {}, num_outputs)

    labels = Labels(likelihood, fisher, samples)
    return squares_estimator(apply, labels, select, {}, finish)


def squares_estimator(
    apply: Callable,
    labels: Labels,
    select: str | Sequence[str] | None,
    bases: Mapping[str, tuple[Array | None, Array | None]],
    finish: Callable[[tuple[BlockSites, ...], dict[str, Array], Array], Curvature],
) -> Estimator:
    """Estimate mean squares of per-example gradients, by block in bases of its own.

    Args:
        apply: the model, `apply(params, inputs) -> outputs`.
        labels: the labels at which gradients are taken.
        select: regular expressions for the paths of the parameters; None: all.
        bases: by block, eigenvectors of A and of G, all of them or the leading ones; None, or no
            entry, for the standard basis.
        finish: makes a curvature of blocks, their mean squares and M.

    Returns:
        The estimator.
    """
    check_function(apply)
    # Each array once: blocks with one basis (query, key and value read one input) would else give
    # it to the jitted step as arguments of which XLA cannot know that they are equal, and the input
    # that they share would be rotated for each of them.
    held = {id(x): x for pair in bases.values() for x in pair if x is not None}
    numbers = {key: number for number, key in enumerate(held)}
    places = {name: [numbers.get(id(x)) for x in pair] for name, pair in bases.items()}

    def shapes(params, batch):
        check_pass(params, batch)

        def zero(params, batch):
            first, key = jnp.zeros((), jnp.int32), jax.random.key(0)
            done = run_pass(apply, labels, params, batch, key, Examples(first), select)
            blocks = group_sites(done.captured.sites, done.alignments)
            squares = {
                b.name: zero_squares(b, done.dtype, bases.get(b.name, NO_BASES)) for b in blocks
            }
            return SquaresState(squares, first, first, blocks, labels.draws)

        return jax.eval_shape(zero, params, batch)

    def init(params, batch, first_example=0):
        shape = shapes(params, batch)
        refuse_unclear_padding(shape.blocks, batch)
        state = zeros(shape, shape.places(params))
        return dataclasses.replace(
            state, next_example=state.next_example + jnp.int32(first_example)
        )

    # The bases are an argument of the jitted step, and no constants in it: they are large.
    def update(held, state, params, batch, key):
        def of_block(name):
            if name not in places:
                return None, None
            left, right = (None if k is None else held[k] for k in places[name])
            return left, right

        def add(state, rows, examples):
            done = run_pass(apply, labels, params, rows, key, examples, select)

            def add_gradients(squares, pulled):
                found = {}
                for block in state.blocks:
                    pair = of_block(block.name)
                    add = add_leading_squares if any(map(has_rest, pair)) else add_squared_gradients
                    found[block.name] = add(done, block, pulled, squares[block.name], pair)
                return found

            squares = done.fold(add_gradients, state.squares)
            number = state.num_outputs + done.num_outputs
            return dataclasses.replace(state, squares=squares, num_outputs=number)

        return over_row_blocks(add, apply, state, params, batch)

    def finalize(state, dtype=None):
        del dtype  # nothing is decomposed
        check_counted(state.num_outputs)
        number = jnp.maximum(state.num_outputs, 1).astype(float) * state.draws
        means = {b.name: mean_squares(state.squares[b.name], number) for b in state.blocks}
        for block in state.blocks:
            check_layers_finite(means[block.name], block.name, block.hint)
        return finish(state.blocks, means, state.num_outputs)

    def groups(params, batch, group_bytes):
        state = shapes(params, batch)
        sizes = device_bytes(state, state.places(params)).squares
        needs = [Footprint(b.weight.paths, {b.name: sizes[b.name]}) for b in state.blocks]
        return tuple(
            squares_estimator(apply, labels, exactly(paths), bases, finish)
            for paths in group_paths(needs, group_bytes)
        )

    check = functools.partial(labels.check, apply)
    step = jax.tree_util.Partial(update, tuple(held.values()))
    return Estimator(init, step, finalize, groups, check)


def zero_squares(
    block: BlockSites, dtype: jnp.dtype, bases: tuple[Array | None, Array | None] = NO_BASES
) -> Array:
    """Return a block's zero sum (layers, rows, d_out), shorter along bases that are not whole."""
    weight = block.weight
    sides = (num_values(q, d) for q, d in zip(bases, (weight.rows, weight.d_out), strict=True))
    return jnp.zeros((weight.layers, *sides), dtype)


def mean_squares(squares: Array, number: Array) -> Array:
    """Return a block's sum of squares over `number`, M times the draws."""
    return squares / number.astype(squares.dtype)


def refuse_unclear_padding(blocks: Iterable[BlockSites], batch: Batch) -> None:
    """Refuse a first batch with padding for sites whose padding cannot be told from data.

    A traced batch shows its padding only to `finalize`, which then names the block.

    Raises:
        ValueError: such a site is selected; it is named.
    """
    unclear = [m.site for b in blocks for m in b.members if not m.is_maskable]
    valid = batch.valid
    if not unclear or valid is None or isinstance(valid, (Tracer, jax.ShapeDtypeStruct)):
        return
    if not jnp.all(valid.astype(bool)):
        raise ValueError(padding_hint(unclear))
