"""Where it still is: what each layer would say, what a probe reads in it, and how deep it is gone.

The logit lens (nostalgebraist, 2020) gives a layer's residual stream to the last norm and the
vocabulary's matrix.  Here that is the whole model with all that later layers write set to zero: in
a residual network their blocks then add nothing, whichever norms stand before or behind them.  No
hidden state has to be found, so it is the same for every family.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit import metrics
from jedit.attacks import linear_probe
from jedit.core.batch import Batch
from jedit.core.paths import exactly, parameter_paths
from jedit.recipes.audit.estimates import BOOTSTRAP, Compared, gap_of, left_of, mean_of
from jedit.recipes.audit.membership import level_of
from jedit.recipes.audit.rows import Rows
from jedit.recipes.audit.rules import REFERENCE, judge, worst_of
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tofu.membership import Answers, spread
from jedit.report.audit_results import Estimate, Finding
from jedit.report.verdict import TELLING_GAP, wilson
from jedit.tracing import find_sites, intervene

# What a block writes into the residual stream, in every family of `jedit.models`.
WRITES = re.compile(r"layers/(\d+)/(attn/(o_proj|attn_vec_einsum)|mlp/down_proj)(/|$)")
ROW_BATCH = 8  # rows of one pass in which all layers' states are kept; arbitrary
NEEDS_RETRAINED = "a depth score compares with a --retrained model"


@functools.cache
def lens(apply: Callable) -> Callable[[PyTree, Any], Array]:
    """Return the function of ((params, layer), inputs) to what the model says after that layer.

    Layer 0 is the embedding alone, the number of all layers the model itself. One object for each
    `apply`, so that what is compiled is found again.
    """

    def after(given: tuple[PyTree, Array], inputs: Any) -> Array:
        params, depth = given
        named = []
        for path, leaf in parameter_paths(params):
            match = WRITES.match(path)
            if match:
                is_kept = depth > int(match[1])
                leaf = jnp.where(is_kept, leaf, jnp.zeros_like(leaf))
            named.append(leaf)
        return apply(jax.tree.unflatten(jax.tree.structure(params), named), inputs)

    return after


def num_layers(params: PyTree) -> int:
    """Return how many layers write into the residual stream."""
    found = [WRITES.match(path) for path, _ in parameter_paths(params)]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def lens_probabilities(
    model: LanguageModel, params: PyTree, asked: Rows
) -> Float[np.ndarray, "layers n"]:
    """Return the probability of each row's answer after the embedding and after each layer.

    Costs a forward pass for each layer.
    """
    apply = lens(model.apply)
    found = [
        metrics.answer_nll_per_row(apply, (params, jnp.int32(depth)), asked.answers)
        for depth in range(num_layers(params) + 1)
    ]
    return np.nan_to_num(np.exp(-np.asarray(found)))


def states_of(
    model: LanguageModel, params: PyTree, asked: Rows
) -> Float[np.ndarray, "layers n width"]:
    """Return the mean hidden state over each row's answer: what enters each layer, and the last.

    What enters is as the layer's first matrix sees it, behind the norm where one stands before.
    """
    sites = find_sites(model.apply, params, asked.answers[0].inputs)
    dense = [name for name, site in sites.items() if site.kind == "dense"]
    first: dict[str, str] = {}
    for name in dense:
        layer = name.split("/")[1] if name.startswith("layers/") else ""
        if layer:
            first.setdefault(layer, name)
    chosen = (*first.values(), dense[-1])
    parts = []
    for start in range(0, len(asked.rows), ROW_BATCH):
        places = np.arange(start, start + ROW_BATCH) % len(asked.rows)
        batch = jax.tree.map(lambda x, p=places: jnp.asarray(x)[p], asked.whole)
        parts.append(np.asarray(_mean_states(model.apply, chosen, params, batch)))
    return np.concatenate(parts, axis=1)[:, : len(asked.rows)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_states(
    apply: Callable, names: tuple[str, ...], params: PyTree, batch: Batch
) -> Float[Array, "layers batch width"]:
    select = exactly([re.sub(r"#\d+$", "", name) for name in names])
    found = intervene(apply, params, batch.inputs, select=select).activations
    counted = jnp.asarray(batch.mask, jnp.float32)
    weights = counted / jnp.maximum(counted.sum(axis=1, keepdims=True), 1)
    states = jnp.stack([found[name].astype(jnp.float32) for name in names])
    return jnp.einsum("bs,lbsw->lbw", weights, states)


def probed(
    forget: Float[np.ndarray, "layers n width"], unseen: Float[np.ndarray, "layers m width"]
) -> list[Estimate]:
    """Return by layer how often a linear probe tells forget from unseen rows.

    It is fitted on one half of the rows and asked about the other, both ways round, on as many of
    either set; 1/2 is chance. Intervals are Wilson's.
    """
    size = min(forget.shape[1], unseen.shape[1]) // 2 * 2
    labels = np.repeat([1, 0], size // 2)
    found = []
    for ours, others in zip(forget, unseen, strict=True):
        halves = [np.concatenate([ours[i:size:2], others[i:size:2]]) for i in (0, 1)]
        right = [linear_probe(halves[i], labels, halves[1 - i], labels).accuracy for i in (0, 1)]
        share = float(np.mean(right))
        found.append(Estimate(share, *wilson(share, 2 * size), 2 * size))
    return found


class Layers(NamedTuple):
    """What each layer says, by role: probabilities of the forget rows, or of unseen ones.

    Attributes:
        lens: by a role of `forgotten.compared` the probabilities of the rows, layers first.
        probe: by role what a probe tells, by layer; empty without unseen rows.
    """

    lens: dict[str, Float[np.ndarray, "layers n"]]
    probe: dict[str, list[Estimate]]


def curves_of(found: Layers) -> dict[str, Any]:
    """Return what the figure shows: by role the means by layer."""
    return {
        "lens": {
            role: [mean_of(row) for row in values]
            for role, values in found.lens.items()
            if role != "unseen_base"
        },
        "probe": found.probe,
        "how": f"lens: {BOOTSTRAP}; probe: Wilson's interval of a share",
    }


def lens_finding(found: Layers) -> Finding:
    """Judge the inner layers by what the last one said of the original model."""

    def at(depth: int) -> Compared:
        values = {role: rows[depth] for role, rows in found.lens.items()}
        return Compared(
            values["base"],
            values["edited"],
            values.get("retrained"),
            values.get("unseen_base"),
            values.get("unseen"),
        )

    last = len(found.lens["base"]) - 1
    whole = at(last)
    if not whole.has_reference:
        return judge("lens", None, reason=REFERENCE)
    if not gap_of(whole).value > TELLING_GAP:
        return judge("lens", None, reason="the original model hardly says it itself")
    shares = {depth: left_of(at(depth), scale=whole, level=level_of(last)) for depth in range(last)}
    told = {depth: share for depth, share in shares.items() if share is not None}
    if not told:
        return judge("lens", None, reason="there is one layer only")
    worst = worst_of("lens", told)
    layer = "the embedding" if worst == 0 else f"layer {worst} of {last}"
    return judge("lens", told[worst], layer=layer)


def depth_finding(
    model: LanguageModel, original: PyTree, edited: PyTree, retrained: PyTree, asked: Rows
) -> tuple[Finding, Estimate | None]:
    """Judge by the Unlearning Depth Score, and return it, row by row where it can be had.

    It is taken of 40 rows at most, spread over the set.
    """
    stream = _stream(model.apply, original, asked)
    if not stream:
        reason = "what this family adds to the residual stream is normed, scaled or mixed"
        return judge("depth_score", None, reason=reason), None
    few, _ = spread(Answers(asked.rows, asked.answers))
    found = metrics.depth_score(model.apply, original, edited, retrained, few, layers=stream)
    scores = found.scores[~np.isnan(found.scores)]
    if not scores.size:
        reason = "no layer of the retrained model lacks what the original one's holds"
        return judge("depth_score", None, reason=reason), None
    estimate = mean_of(scores)
    return judge("depth_score", estimate), estimate


def _stream(apply: Callable, params: PyTree, asked: Rows) -> tuple[tuple[str, ...], ...]:
    """Return by depth the sites that write into the residual stream; none if it is not plain.

    It is not plain where a layer's last matrix is followed by a norm, the embedding by a factor, or
    where a layer mixes experts.
    """
    sites = list(find_sites(apply, params, asked.answers[0].inputs))
    layers: dict[int, list[str]] = {}
    for name in sites:
        if match := re.match(r"layers/(\d+)/", name):
            layers.setdefault(int(match[1]), []).append(name)
    if any("attn_vec_einsum" in name for name in sites):  # Gemma's embedding is scaled
        return ()
    found = []
    for depth, names in sorted(layers.items()):
        if not WRITES.match(names[-1]):
            return ()
        begin = [name for name in sites if name.startswith("embedder/") and "#" not in name]
        found.append((*(begin if depth == 0 else ()), *(n for n in names if WRITES.match(n))))
    return tuple(found)
