"""Unlearning Depth Score, UDS (Lee, Kim and Jo, arXiv 2605.24614): is it gone from every layer?

The hidden states of a source model are put into the original one, layer by layer, at the places
that predict an answer's tokens; what the original then no longer says, the source did not hold.

    h_l(M)      residual stream behind layer l of model M
    s_n         mean_t log p(y_nt) of the original model
    s_n,l(M)    the same with h_l(M) in the place of its own h_l, at the places t alone
    Δ_n,l(M)    s_n - s_n,l(M), the gap                                     `edited_gaps`, ...
    K_n         {l : Δ_n,l(retrained) > τ}, layers that hold what the retrained model lacks

    UDS_n = Σ_{l in K_n} Δ_n,l(retrained) clip(Δ_n,l(edited) / Δ_n,l(retrained), 0, 1)
            / Σ_{l in K_n} Δ_n,l(retrained)

1: erased in every layer as far as by retraining; 0: all of it is still there, however little the
outputs say.  A row without such a layer has no score.  The retrained model has 1 and the original
0, both exactly.  Equations 1 to 6 of the paper and its released code.

How a stream is read and replaced: no site is the stream itself, whose layers add to it.  h_l is the
sum of what the sites of layers up to l wrote, their biases included, so what is added to the output
of one of layer l's is h_l(source) - h_l(original), which puts the one in the place of the other.

Differences.  The paper scores a fact's words alone ("entity span"), in 367 questions chosen by
hand; ours scores whatever the batch counts, so mask the other words for the paper's number.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_params
from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.outputs import by_example, counted_outputs
from jedit.core.paths import exactly, parameter_paths
from jedit.core.precision import wide
from jedit.metrics.streaming import each_batch
from jedit.objectives.token_nll import nll_of
from jedit.tracing import Sites, find_sites, intervene

Layers = tuple[tuple[str, ...], ...]


class DepthScores(NamedTuple):
    """How deep an answer is erased, and what each layer lost of it.

    Attributes:
        scores: UDS of each row, from 0 to 1; NaN where no layer of the retrained model has a gap.
        edited_gaps: falls of the mean log-probability by the edited model's states, in nats.
        retrained_gaps: the same by the retrained model's states.
    """

    scores: Float[np.ndarray, " n"]
    edited_gaps: Float[np.ndarray, "n layers"]
    retrained_gaps: Float[np.ndarray, "n layers"]

    __repr__ = short_repr

    @property
    def mean(self) -> float:
        """Return the model's UDS, the mean over the rows that have a score; NaN if none has."""
        known = self.scores[~np.isnan(self.scores)]
        return float(known.mean()) if known.size else float("nan")


@on_auto_axes
def depth_score(
    apply: Apply,
    original: PyTree,
    edited: PyTree,
    retrained: PyTree,
    batches: Iterable[Batch] | Batch,
    *,
    layers: Sequence[Sequence[str]],
    threshold: float = 0.05,
) -> DepthScores:
    """Score how deep the edited model has forgotten the rows, in the order given.

        layers = [["positions", "blocks/0/attn/out/kernel", "blocks/0/mlp/down/kernel"],
                  ["blocks/1/attn/out/kernel", "blocks/1/mlp/down/kernel"]]
        depth_score(apply, original, edited, retrained, forget, layers=layers).mean

    Costs three forward passes and 2 L + 1 of the original model, L the number of layers.

    Args:
        apply: `apply(params, inputs) -> logits`, of a network with a residual stream.
        original: parameters of the model that knows the rows.
        edited: parameters of the model that is to have forgotten them.
        retrained: parameters of a model that never learned them.
        batches: rows; states are patched at the outputs that count. Rows without any are left out.
        layers: by depth, the sites whose outputs are added to the residual stream in each layer;
            the embedding belongs to the first. A site of kind "bias", such as learned positions,
            has the sum that it is added into as its output, and that is taken to be the stream.
        threshold: τ, in nats; 0.05 is the paper's.

    Returns:
        A score and the gaps of each row; it has NaN too where a destroyed model's states do.

    Raises:
        ValueError: there are no layers, one is empty, a name is no site or stands in two of them, a
            site's output has not the shape of the stream, or a batch is packed.
    """
    check_numbers(NOT_NEGATIVE, threshold=threshold)
    depth = tuple(tuple(names) for names in layers)
    _check_layers(depth)
    found: list[np.ndarray] = []
    for params in (edited, retrained):
        check_params(params)
    for batch in each_batch(apply, original, batches):
        _check_sites(apply, original, batch, depth)
        gaps, number = jax.device_get(_gaps(apply, depth, original, edited, retrained, batch))
        found.append(gaps[:, :, number > 0])
    shape = (2, len(depth), 0)
    gaps = np.concatenate([np.zeros(shape), *found], axis=2)  # float64 from here on
    ours, theirs = np.moveaxis(gaps, 2, 1)
    weights = np.where(theirs > threshold, theirs, 0)
    total = weights.sum(axis=1)
    # The weight times the clipped ratio is the gap itself, between 0 and the weight.
    erased = np.clip(ours, 0, weights).sum(axis=1)
    scores = np.where(total > 0, erased / np.where(total > 0, total, 1), np.nan)
    return DepthScores(scores, ours, theirs)


def _check_layers(layers: Layers) -> None:
    names = [name for layer in layers for name in layer]
    if not all(layers) or not layers or len(set(names)) < len(names):
        raise ValueError(f"layers must name different sites, one at least in each; got {layers}")


def _check_sites(apply: Apply, params: PyTree, batch: Batch, layers: Layers) -> None:
    sites = find_sites(apply, params, batch.inputs)
    names = [name for layer in layers for name in layer]
    if unknown := [name for name in names if name not in sites]:
        raise ValueError(f"{unknown} are no sites of this function; its sites are: {list(sites)}")
    shapes = {name: sites[name].output_shape for name in names}
    lead = jax.eval_shape(apply, params, batch.inputs).shape[:-1]
    if len(set(shapes.values())) > 1 or next(iter(shapes.values()))[:-1] != lead:
        raise ValueError(
            f"the outputs of all sites must be as the residual stream, {lead} and its width; got "
            f"{shapes}"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gaps(
    apply: Apply, layers: Layers, original: PyTree, edited: PyTree, retrained: PyTree, batch: Batch
) -> tuple[Float[Array, "2 layers batch"], Array]:
    """Return the gaps of the edited and of the retrained model, and how much each row counts."""
    sites = find_sites(apply, original, batch.inputs)
    select = exactly([sites[name].path for layer in layers for name in layer])

    def streams(params: PyTree) -> Float[Array, "layers *lead width"]:
        found = intervene(apply, params, batch.inputs, select=select).site_outputs
        return _streams(sites, dict(parameter_paths(params)), found, layers)

    own = streams(original)
    counted = counted_outputs(batch, own.shape[1:-1])
    changes = jnp.stack([streams(edited) - own, streams(retrained) - own])
    changes = jnp.where(counted[..., None], changes, 0).reshape(-1, *own.shape[1:])

    def run(case: tuple[Array, Array]) -> Array:
        depth, change = case
        add = {
            names[-1]: jnp.where(depth == i, change, jnp.zeros_like(change))
            for i, names in enumerate(layers)
        }
        patched = intervene(apply, original, batch.inputs, add=add, select=select).outputs
        nll, _ = nll_of(patched, batch)
        return jnp.sum(by_example(batch, nll), axis=1)

    # All cases run one program, the one without a change too: where states are equal, so is what
    # is said, to the bit.
    depths = jnp.concatenate([jnp.tile(jnp.arange(len(layers)), 2), jnp.full(1, -1)])
    sums = jax.lax.map(run, (depths, jnp.concatenate([changes, jnp.zeros_like(changes[:1])])))
    number = jnp.sum(by_example(batch, counted), axis=1)
    gaps = (sums[:-1] - sums[-1:]) / jnp.maximum(number, 1).astype(sums.dtype)[None]
    return gaps.reshape(2, len(layers), -1), number


def _streams(
    sites: Sites, leaves: dict[str, Array], outputs: dict[str, Array], layers: Layers
) -> Float[Array, "layers *lead width"]:
    """Return the residual stream behind each layer, the sum of what was written into it."""
    stream, found = jnp.zeros(()), []
    for names in layers:
        for name in names:
            site = sites[name]
            written = wide(outputs[name])
            if site.weight.bias_path is not None:
                # A site's output is without its bias, which is another one in each model.
                bias = wide(site.weight.bias_row.gather(leaves)) * site.bias_scale
                written = written + bias.reshape((1,) * (written.ndim - 1) + (-1,))
            # What a bias by itself leaves is the sum that it is part of, which is the stream.
            is_whole = stream.ndim == 0 or site.kind == "bias"
            stream = written if is_whole else stream + written
        found.append(stream)
    return jnp.stack(found)
