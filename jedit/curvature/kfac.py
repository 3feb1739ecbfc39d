"""Kronecker-factored approximate curvature (Martens & Grosse 2015; sharing after Eschenhagen 2023).

    A = E[a aᵀ]     over valid positions              (bias: a's last coordinate is one)
    G = (1/M) Σ_n Σ_s g gᵀ                            sharing="expand"
    A = E[ā āᵀ], G = (1/M) Σ_n ĝ ĝᵀ, ā mean, ĝ sum    sharing="reduce", over an example's positions
    A = cov a, G = E[g gᵀ] - E[g] E[g]ᵀ               centred: less the means, the bias's row zero

g is the gradient of the summed loss at the site's output, M the number of unmasked outputs, so that
A ⊗ G approximates a block of the Gauss-Newton matrix of the *mean* loss. Norm gains and other
vectors get the exact diagonal instead. A parameter used at several sites gets the Kronecker product
that has the two partial traces of the sum over its sites (`assemble.merge`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_function, check_word
from jedit.core.devices import on_auto
from jedit.core.display import short_repr
from jedit.core.paths import exactly
from jedit.curvature.assemble import Sums, Totals, assemble
from jedit.curvature.captured_batch import (
    Examples,
    Fisher,
    Labels,
    check_pass,
    over_row_blocks,
    run_pass,
)
from jedit.curvature.checks import check_counted, check_has, check_layers_finite
from jedit.curvature.diagonal import mean_squares, refuse_unclear_padding, zero_squares
from jedit.curvature.eigenbases import Moment, shape_of
from jedit.curvature.estimator import Estimator
from jedit.curvature.factorization import Choice, Factorize, choose, factorizing
from jedit.curvature.layout import BlockSites, group_sites
from jedit.curvature.likelihoods import Likelihood
from jedit.curvature.limits import check_decomposable, limit_of
from jedit.curvature.memory import Footprint, device_bytes, group_paths
from jedit.curvature.mesh.eigenbases import factorize_all
from jedit.curvature.mesh.placement import (
    best_split,
    factor_place,
    leaf_shardings,
    matrix_sharding,
    placed,
    placed_curvature,
    undivided,
    whole,
    zeros,
)
from jedit.curvature.moments import (
    InputSums,
    Sharing,
    add_inputs,
    add_output_totals,
    add_outputs,
    check_sharing,
    zero_input_sums,
    zero_output_sums,
)
from jedit.curvature.sketch import Sketch
from jedit.curvature.squared_gradients import add_squared_gradients
from jedit.curvature.starts import by_factor, by_site, check_start
from jedit.curvature.types import Curvature, Diagonal, Kronecker, pytree


@pytree("blocks", "draws", "shardings")
@dataclasses.dataclass(frozen=True)
class KfacState:
    """Sums of moments over batches; states of disjoint data merge by adding leaf by leaf.

    Attributes:
        inputs: by input group, sums over what enters.
        outputs: by site, Σ g gᵀ (layers, d_out, d_out), of which the lower block triangle counts;
            its diagonal (layers, d_out); or its sketch.
        squares: by block of a vector parameter, Σ_n (∂ℓ_n)² (layers, 1, d).
        num_outputs: M, the number of outputs that counted, int32.
        next_example: the running example number, int32; a sum of states has one beyond all theirs.
        blocks: static; the parameters and sites of each block.
        draws: static; how many pullbacks a batch's gradients are the mean of.
        shardings: static; how each block's parameter lies on a mesh; empty on one device.
        gradients: by site, Σ g (layers, d_out), of centred moments; empty where they are not.
    """

    inputs: dict[str, InputSums]
    outputs: dict[str, Array | Sketch]
    squares: dict[str, Array]
    num_outputs: Array
    next_example: Array
    blocks: tuple[BlockSites, ...]
    draws: int
    shardings: tuple[NamedSharding | None, ...] = ()
    gradients: dict[str, Array] = dataclasses.field(default_factory=dict)

    __repr__ = short_repr

    def places(self, params: PyTree) -> "KfacState | None":
        """Return the shardings of all sums, after those of the parameters; None on one device."""
        leaves = leaf_shardings(params)
        if not leaves:
            return None
        found = undivided(self, leaves)
        for block in self.blocks:
            # A flipped member reads the transposed matrix: its rows lie as the block's columns do.
            for member in block.members:
                matrix = matrix_sharding(block.weight, leaves, is_flipped=member.is_flipped)
                if matrix is None:
                    continue
                if block.is_diagonal:
                    shape = self.squares[block.name].shape
                    found.squares[block.name] = best_split(matrix, shape)
                    continue
                found.inputs[member.group] = found.inputs[member.group]._replace(
                    moment=_sum_place(matrix, self.inputs[member.group].moment, 1)
                )
                found.outputs[member.site] = _sum_place(matrix, self.outputs[member.site], 2)
        return found

    def footprints(self, params: PyTree) -> list[Footprint]:
        """Return the bytes on a device of the sums of each block."""
        sizes = device_bytes(self, self.places(params))
        needs = []
        for block in self.blocks:
            if block.is_diagonal:
                sums = {f"squares of {block.name}": sizes.squares[block.name]}
            else:
                sums = {f"output of {m.site}": sizes.outputs[m.site] for m in block.members}
                sums |= {f"input {m.group}": sizes.inputs[m.group].moment for m in block.members}
                sums = {name: sum(jax.tree.leaves(x)) for name, x in sums.items()}
            needs.append(Footprint(block.weight.paths, sums))
        return needs


def _sum_place(matrix: NamedSharding, moment: Array | Sketch, dim: int) -> Any:
    """Return where the sum of a moment lies; a sketch by its rows, and its traces whole."""
    if isinstance(moment, Sketch):
        places: Any = (factor_place(matrix, moment.image.shape, dim), whole(matrix))
        return Sketch(*places)
    return factor_place(matrix, moment.shape, dim)


def kfac(
    apply: Callable,
    likelihood: Likelihood,
    *,
    select: str | Sequence[str] | None = None,
    fisher: Fisher = "sampled",
    samples: int = 1,
    sharing: Sharing = "expand",
    factorize: Factorize | Choice = Factorize(),  # noqa: B008 - frozen and hashable
    centred: bool = False,
) -> Estimator:
    """Estimate the curvature of the mean output loss by K-FAC.

        estimator = kfac(apply, Categorical(), select="mlp", factorize="cholesky")
        step = solve(estimate(estimator, params, batches, key=key), gradient, damping=0.1)

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`.
        likelihood: what the outputs mean, e.g. `Categorical()`.
        select: regular expression, or several, on parameter paths; None: all that can be captured.
        fisher: labels "sampled" from the model (the Gauss-Newton matrix of the output KL), "exact"
            (all classes of every position: as many backward passes), or "empirical" (given
            targets). A site whose entries influence several examples, e.g. a lookup of positions,
            has exact and empirical labels flow back example by example, at that many times the
            cost; there sampled ones, which do not, differ by noise of mean zero with the batches'
            cut.
        samples: draws of labels a batch, for "sampled".
        sharing: "expand" or "reduce" over an example's positions.
        factorize: how the factors are kept: "eigh", "cholesky", "inverse", "auto", or a
            `Factorize`, by which leading eigenvectors can be kept, iterated or streamed. Solves,
            products, quadratic forms, traces, K-FADE and many requests' edits need no eigenvectors;
            powers, EK-FAC and null spaces do.
        centred: whether the means over the positions are taken off both moments; then it is no
            Gauss-Newton matrix, but says where inputs and gradients vary. False: they are moments
            about zero.

    Returns:
        The estimator. A pass costs one forward, one activation-backward pass and the moments,
        d_in² + d_out² multiply-adds a position and site (about half of that for large d); its state
        takes the factors' size. Streamed, the moments cost 2 d m multiply-adds a position and side
        with m = 2k + 8 columns, and the state takes d m numbers.

    Raises:
        TypeError: `apply` is no function, or `likelihood` no likelihood.
        ValueError: `fisher` or `sharing` is another word, or centred moments are to be of exact
            labels, of which the mean is zero. From `init`: the curvature to start from is of other
            parameters, or one of its blocks of another matrix.
    """
    how = factorizing(factorize)
    how = dataclasses.replace(how, start=on_auto(how.start))
    check_function(apply)
    check_word(Sharing, sharing=sharing)
    labels = Labels(likelihood, fisher, samples)
    if centred and fisher == "exact":
        raise ValueError(
            'centred moments are of labels that are drawn or given, got fisher="exact"'
        )

    def shapes(params, batch):
        check_pass(params, batch)

        # Only shapes are wanted: nothing is computed, and the key draws nothing.
        def zero(params, batch):
            first, key = jnp.zeros((), jnp.int32), jax.random.key(0)
            done = run_pass(apply, labels, params, batch, key, Examples(first), select)
            sites = done.captured.sites
            blocks = group_sites(sites, done.alignments)
            members = [m for b in blocks if not b.is_diagonal for m in b.members]
            gradients = {
                m.site: jnp.zeros(
                    (sites[m.site].weight.layers, sites[m.site].weight.d_out), done.dtype
                )
                for m in members
                if centred
            }
            for member in members:
                check_sharing(sharing, sites[member.site], done.alignments[member.site])
            return KfacState(
                {m.group: zero_input_sums(sites[m.site], done.dtype, how) for m in members},
                {m.site: zero_output_sums(sites[m.site], done.dtype, how) for m in members},
                {b.name: zero_squares(b, done.dtype) for b in blocks if b.is_diagonal},
                first,
                first,
                blocks,
                labels.draws,
                gradients=gradients,
            )

        return jax.eval_shape(zero, params, batch)

    def init(params, batch, first_example=0):
        if how.start is not None:
            check_has((b.weight for b in how.start.blocks.values()), params, "start")
        shape = shapes(params, batch)
        _check_factors(shape, params, how)
        refuse_unclear_padding(shape.blocks, batch)
        state = _on_mesh(zeros(shape, shape.places(params)), params)
        return dataclasses.replace(
            state, next_example=state.next_example + jnp.int32(first_example)
        )

    # An earlier curvature is an argument of the jitted step, and no constant in it: it is large.
    def update(earlier, state, params, batch, key):
        begun = by_site(state.blocks, earlier)

        def add(state, rows, examples):
            done = run_pass(apply, labels, params, rows, key, examples, select)
            return _added(done, state, *begun)

        return over_row_blocks(add, apply, state, params, batch)

    def _added(done, state, inputs_begin, outputs_begin):
        sites = done.captured.sites
        members = [m for b in state.blocks if not b.is_diagonal for m in b.members]
        diagonals = [b for b in state.blocks if b.is_diagonal]
        # Sites that read one input share its sums, which are made once, from the first of them.
        first_reader = {m.group: m.site for m in reversed(members)}
        inputs = {
            group: add_inputs(
                sums, done, sites[first_reader[group]], sharing, inputs_begin.get(group)
            )
            for group, sums in state.inputs.items()
        }

        def add_gradients(sums, pulled):
            outputs, totals, squares = sums
            return (
                {
                    m: add_outputs(x, done, sites[m], pulled, sharing, outputs_begin.get(m))
                    for m, x in outputs.items()
                },
                {m: add_output_totals(x, done, sites[m], pulled) for m, x in totals.items()},
                {
                    b.name: add_squared_gradients(done, b, pulled, squares[b.name])
                    for b in diagonals
                },
            )

        outputs, totals, squares = done.fold(
            add_gradients, (state.outputs, state.gradients, state.squares)
        )
        number = state.num_outputs + done.num_outputs
        return dataclasses.replace(
            state,
            inputs=inputs,
            outputs=outputs,
            squares=squares,
            num_outputs=number,
            gradients=totals,
        )

    def groups(params, batch, group_bytes):
        shape = shapes(params, batch)
        _check_factors(shape, params, how)  # of all groups, before the first is summed
        needs = shape.footprints(params)
        rest: dict[str, Any] = {"fisher": fisher, "samples": samples, "sharing": sharing}
        rest |= {"factorize": how, "centred": centred}
        return tuple(
            kfac(apply, likelihood, select=exactly(paths), **rest)
            for paths in group_paths(needs, group_bytes)
        )

    def planned(params, batch):
        state = _on_mesh(shapes(params, batch), params)
        curvature = jax.eval_shape(functools.partial(_planned, how=how), state)
        return placed(state, state.places(params)), placed_curvature(curvature)

    check = functools.partial(labels.check, apply)
    finalize = functools.partial(_finalize, how=how)
    step = jax.tree_util.Partial(update, how.start if how.streamed else None)
    return Estimator(init, step, finalize, groups, check, planned)


def _on_mesh(state: KfacState, params: PyTree) -> KfacState:
    """Return the state with how the blocks' matrices lie, if they are on a mesh."""
    leaves = leaf_shardings(params)
    shardings = tuple(matrix_sharding(b.weight, leaves) for b in state.blocks)
    return dataclasses.replace(state, shardings=shardings if leaves else ())


def _finalize(state: KfacState, dtype=None, *, how: Factorize) -> Curvature:
    """Normalise, merge sites of one parameter, decompose; shared factors once."""
    check_counted(state.num_outputs)
    blocks, moments = _assembled(state, how)
    # Here and not where they are made: a plan makes them of shapes, which have no numbers.
    for block in state.blocks:
        if isinstance(diagonal := blocks[block.name], Diagonal):
            check_layers_finite(diagonal.values, block.name, block.hint)
    chosen, factors = _chosen(blocks, moments, how), {}
    begun = by_factor(blocks, how.start)
    for one in dict.fromkeys(chosen.values()):
        part = {name: moment for name, moment in moments.items() if chosen[name] == one}
        factors |= factorize_all(part, dtype, how=one, starts=begun)
    return Curvature(blocks, {name: factors[name] for name in moments}, state.num_outputs)


def _planned(state: KfacState, *, how: Factorize) -> Curvature:
    """Return a curvature of the shapes of the state's, with matrices for their eigenbases."""
    blocks, moments = _assembled(state, how)
    chosen = _chosen(blocks, moments, how)
    factors = {name: shape_of(m.matrix, chosen[name]) for name, m in moments.items()}
    return Curvature(blocks, factors, state.num_outputs)


def _chosen(blocks, moments, how: Factorize) -> dict[str, Factorize]:
    """Return how each factor is kept."""
    pairs = [(b.input, b.output) for b in blocks.values() if isinstance(b, Kronecker)]
    sides = {n: m.matrix.shape[-1] * (m.matrix.ndim == 3) for n, m in moments.items()}
    return choose(pairs, sides, how)


def _check_factors(state: KfacState, params: PyTree, how: Factorize) -> None:
    """Refuse a start of another matrix, and what no library can decompose, before any batch."""
    if how.start is not None:
        check_start(state.blocks, how.start)
    limit = limit_of(params)
    moments = jax.tree.leaves((state.inputs, state.outputs))
    longest = max((x.shape[-1] for x in moments if x.ndim == 3), default=0)
    if limit is not None and longest + 1 > limit.columns:  # a bias adds a column
        shapes = jax.eval_shape(functools.partial(_planned, how=how), state)
        check_decomposable(shapes, limit, streamed=how.streamed)


def _assembled(
    state: KfacState, how: Factorize
) -> tuple[dict[str, Kronecker | Diagonal], dict[str, Moment]]:
    moments: dict[str, Moment] = {}
    blocks = {}
    number = jnp.maximum(state.num_outputs, 1).astype(float) * state.draws
    shardings = state.shardings or (None,) * len(state.blocks)
    means = Totals(state.gradients, state.draws) if state.gradients else None
    begun = by_site(state.blocks, how.start if how.streamed else None)
    sums = Sums(state.inputs, state.outputs, number, begun, means)
    for block, sharding in zip(state.blocks, shardings, strict=True):
        if block.is_diagonal:
            values = mean_squares(state.squares[block.name], number)
            blocks[block.name] = Diagonal(block.weight, values)
        else:
            blocks[block.name] = assemble(block, sums, moments, sharding)
    return blocks, moments
