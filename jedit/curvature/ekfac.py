"""Eigenvalue-corrected K-FAC (George et al. 2018).

    Λ = (1/M) Σ_n [ Q_Aᵀ ∇_W ℓ_n Q_G ]²

ℓ_n the sum over example n's unmasked outputs: the diagonal of the Gauss-Newton matrix of the mean
loss in K-FAC's eigenbasis. It is normalised as K-FAC's own eigenvalues a_i g_j are, per output, so
that one damping means one thing for both.
"""

import dataclasses
from collections.abc import Callable

from jedit.core.arguments import check_kind
from jedit.core.devices import on_auto
from jedit.core.paths import exactly
from jedit.curvature.captured_batch import Fisher, Labels
from jedit.curvature.checks import check_covers, eigenbasis_of
from jedit.curvature.diagonal import squares_estimator
from jedit.curvature.estimator import Estimator
from jedit.curvature.likelihoods import Likelihood
from jedit.curvature.types import Curvature, Diagonal, Kronecker


def ekfac(
    apply: Callable,
    likelihood: Likelihood,
    kfac_curvature: Curvature,
    *,
    fisher: Fisher = "sampled",
    samples: int = 1,
) -> Estimator:
    """Correct the spectrum of a K-FAC curvature in its own eigenbasis, by EK-FAC.

    Args:
        apply: the model, `apply(params, inputs) -> outputs`.
        likelihood: what the outputs mean; as a rule the one that `kfac` was given.
        kfac_curvature: the K-FAC curvature whose eigenbases and parameters are taken.
        fisher: "sampled", "exact" or "empirical", as for `kfac`.
        samples: draws of labels a batch, for "sampled".

    Returns:
        The estimator. A pass costs one forward, one activation-backward pass, the two rotations and
        the per-example gradients, d_in² + d_out² + d_in d_out multiply-adds a position and site.

    Raises:
        TypeError: an argument is something else.
        ValueError: `fisher` is another word, the curvature has not all eigenvectors, or the model
            is without its parameters.
    """
    check_kind(kfac_curvature, Curvature, "kfac_curvature", "as `estimate` returns it")
    kfac_curvature = on_auto(kfac_curvature)
    factors = kfac_curvature.factors

    def basis(factor, name):
        return eigenbasis_of(factors[factor], name)[0]

    bases = {
        name: (basis(block.input, name), basis(block.output, name))
        for name, block in kfac_curvature.blocks.items()
        if isinstance(block, Kronecker)
    }

    def finish(blocks, means, num_outputs):
        corrected = {}
        for name in (b.name for b in blocks):
            block = kfac_curvature.blocks[name]
            field = "values" if isinstance(block, Diagonal) else "corrected"
            corrected[name] = dataclasses.replace(block, **{field: means[name]})
        # A diagonal block uses no factor, and a group of blocks only its own.
        kronecker = [b for b in corrected.values() if isinstance(b, Kronecker)]
        used = {name for block in kronecker for name in (block.input, block.output)}
        return Curvature(corrected, {n: f for n, f in factors.items() if n in used}, num_outputs)

    paths = exactly(kfac_curvature.covered)
    whole = squares_estimator(apply, Labels(likelihood, fisher, samples), paths, bases, finish)

    def init(params, batch, first_example=0):
        check_covers(kfac_curvature, params)
        return whole.init(params, batch, first_example)

    def groups(params, batch, group_bytes):
        check_covers(kfac_curvature, params)
        assert whole.groups is not None
        return whole.groups(params, batch, group_bytes)

    return Estimator(init, whole.update, whole.finalize, groups, whole.check)
