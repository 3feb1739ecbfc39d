"""Eigenvalue-corrected K-FAC (George et al. 2018) and the diagonal Fisher.

    Λ = (1/M) Σ_n [ Q_Aᵀ ∇_W ℓ_n Q_G ]²

ℓ_n the sum over example n's unmasked outputs: the diagonal of the Gauss-Newton matrix of the mean
loss in K-FAC's eigenbasis, normalised as K-FAC's own eigenvalues a_i g_j are, per output, so that one
damping means one thing for both. With Q = 1 it is the diagonal approximation.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit.curvature.blocks import Curvature, Diagonal, Kronecker
from jedit.curvature.estimator import Estimator
from jedit.curvature.factorize import check_finite
from jedit.curvature.grouping import Block, group_sites
from jedit.curvature.kfac import PADDING_HINT, check_padding
from jedit.curvature.likelihoods import Likelihood
from jedit.curvature.scores import is_matched, run_pass
from jedit.curvature.squares import add_squared_gradients


@dataclasses.dataclass(frozen=True)
class SquaresState:
    """Sums over batches; states of disjoint data merge by adding them leaf by leaf.

    Attributes:
        squares: by block, the sum of squared per-example gradients (layers, rows, d_out).
        num_outputs: M, int32.
        num_examples: the running example number, int32.
        blocks: static.
        draws: static; how many pullbacks a batch's gradients are the mean of.
    """

    squares: dict[str, Array]
    num_outputs: Array
    num_examples: Array
    blocks: tuple[Block, ...]
    draws: int


jax.tree_util.register_dataclass(
    SquaresState,
    data_fields=["squares", "num_outputs", "num_examples"],
    meta_fields=["blocks", "draws"],
)


def ekfac(
    apply: Callable,
    likelihood: Likelihood,
    kfac_curvature: Curvature,
    *,
    fisher: str = "sampled",
    samples: int = 1,
) -> Estimator:
    """EK-FAC: the spectrum of a K-FAC curvature corrected in its own eigenbasis.

    Args:
        apply: as for `kfac`.
        likelihood: as for `kfac`; the same one, as a rule.
        kfac_curvature: whose eigenbases and parameters are taken.
        fisher: "sampled", "exact" or "empirical".
        samples: draws of labels a batch, for "sampled".

    Returns:
        The estimator. A pass costs one forward, one activation-backward pass, the two rotations and
        the per-example gradients, d_in² + d_out² + d_in d_out multiply-adds a position and site.
    """
    paths = [f"^{_escape(path)}$" for path in kfac_curvature.covered]

    def finalize(state: SquaresState) -> Curvature:
        blocks = {}
        for name, values in _mean_squares(state).items():
            block = kfac_curvature.blocks[name]
            if isinstance(block, Diagonal):
                blocks[name] = dataclasses.replace(block, values=values)
            else:
                blocks[name] = dataclasses.replace(block, corrected=values)
        return Curvature(blocks, kfac_curvature.factors, state.num_outputs)

    return _squares(apply, likelihood, paths, fisher, samples, kfac_curvature, finalize)


def diagonal(
    apply: Callable,
    likelihood: Likelihood,
    *,
    select=None,
    fisher: str = "sampled",
    samples: int = 1,
) -> Estimator:
    """The diagonal of the Gauss-Newton matrix of the mean loss; arguments as for `kfac`."""

    def finalize(state: SquaresState) -> Curvature:
        weights = {block.name: block.weight for block in state.blocks}
        means = _mean_squares(state)
        blocks = {name: Diagonal(weights[name], values) for name, values in means.items()}
        return Curvature(blocks, {}, state.num_outputs)

    return _squares(apply, likelihood, select, fisher, samples, None, finalize)


def _squares(apply, likelihood, select, fisher, samples, curvature, finalize) -> Estimator:
    def run(params, batch, key, first):
        options = {"select": select, "fisher": fisher, "samples": samples}
        return run_pass(apply, likelihood, params, batch, key, first, **options)

    def bases_of(curvature: Curvature | None, name: str):
        block = None if curvature is None else curvature.blocks[name]
        if not isinstance(block, Kronecker):
            return (None, None)
        return tuple(curvature.factors[f].basis for f in (block.input, block.output))

    def accumulate(curvature, state, params, batch, key):
        first = jnp.zeros((), jnp.int32) if state is None else state.num_examples
        done = run(params, batch, key, first)
        sites = done.captured.sites
        blocks = group_sites(sites, {n: is_matched(s, done.lead) for n, s in sites.items()})

        def squares(pulled):
            return {
                b.name: add_squared_gradients(done, b, pulled, None, bases_of(curvature, b.name))
                for b in blocks
            }

        new = done.sum_over_cotangents(squares)
        old = state or SquaresState({}, 0, 0, blocks, 0)
        return SquaresState(
            {name: old.squares[name] + x if old.squares else x for name, x in new.items()},
            old.num_outputs + done.num_outputs,
            old.num_examples + jnp.int32(done.lead[0]),
            blocks,
            samples if fisher == "sampled" else 1,
        )

    def init(params, batch):
        check_padding(run, params, batch)
        shape = jax.eval_shape(
            lambda c, p, b: accumulate(c, None, p, b, jax.random.key(0)), curvature, params, batch
        )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)

    return Estimator(init, jax.tree_util.Partial(accumulate, curvature), finalize)


def _mean_squares(state: SquaresState) -> dict[str, Array]:
    number = jnp.maximum(state.num_outputs, 1) * state.draws
    means = {}
    for block in state.blocks:
        values = state.squares[block.name]
        means[block.name] = values / number.astype(values.dtype)
        hint = "" if all(m.is_matched for m in block.members) else PADDING_HINT
        check_finite(means[block.name], block.name, hint)
    return means


def _escape(path: str) -> str:
    import re

    return re.escape(path)
