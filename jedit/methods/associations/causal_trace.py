"""Causal tracing: in which layers an answer is looked up (ROME, arXiv 2202.05262; used by KUDA).

    clean       p(answer | x)
    corrupted   the same with noise ε ~ N(0, (νσ)²) on the embeddings of the subject's tokens
    restored    corrupted, and the outputs of the layers in a window put back to their clean values
    IE          p_restored - p_corrupted, the indirect effect of that window

    σ       standard deviation of the subject tokens' embeddings
    ν       `noise`
    window  `window` layers around each, cut off at the ends

The layer whose window has the largest mean effect is where KUDA edits.

Differences. p is the geometric mean over the answer's tokens; for one token that is ROME's. Outputs
are put back at all of `positions` at once, ROME's token by token: call it with one. σ is that of
the batch given.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from jedit.core.arguments import (
    check_batch,
    check_function,
    check_key,
    check_kind,
    check_params,
    nearest,
)
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, NOT_NEGATIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.precision import wide
from jedit.curvature.positions import align
from jedit.curvature.types import pytree
from jedit.objectives.token_nll import counted_nll
from jedit.tracing import intervene
from jedit.tracing.discover import trace_program


@pytree("embedding", "noise", "samples")
@dataclasses.dataclass(frozen=True, eq=False)
class Corruption:
    """The corruption of a run: noise on the embeddings of a subject's tokens.

    Attributes:
        embedding: name of the site that embeds the tokens, output (batch, seq, width).
        subject: the tokens that get noise.
        noise: ν (ROME: 3).
        samples: number of draws of noise (ROME: 10).
    """

    embedding: str
    subject: Bool[Array, "batch seq"]
    noise: float = 3.0
    samples: int = 10

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, samples=self.samples)
        check_numbers(NOT_NEGATIVE, noise=self.noise)


@pytree("layers", "window")
@dataclasses.dataclass(frozen=True, eq=False)
class Restoration:
    """The part of a corrupted run that is put back to its clean values, window by window.

    Attributes:
        layers: names of sites, one a layer, first to last, whose outputs are put back, MLP outputs
            for instance; or of one site that a scan runs through, layers in front.
        window: number of layers put back together (ROME: 10).
        positions: where outputs are put back; None: at the subject's tokens.
    """

    layers: str | Sequence[str]
    window: int = 10
    positions: Bool[Array, "batch seq"] | None = None

    def __post_init__(self) -> None:
        """Refuse a window below one, and no layer.

        Raises:
            ValueError: a window below one, or no layer.
        """
        check_numbers(COUNT, window=self.window)
        if not self.layers:
            raise ValueError(f"a restoration needs a layer at least, got layers={self.layers!r}")


class CausalTrace(NamedTuple):
    """Probabilities of the answers in clean, corrupted and restored runs, means over the noise.

    Attributes:
        clean: p(answer | x) of the clean run, (batch,).
        corrupted: mean probability of the corrupted runs, (batch,).
        restored: mean probabilities, (layers, batch), row l with the window around layer l put
            back.
        windows: (layers, layers) booleans; row l says which layers that window holds.
    """

    clean: Float[Array, " batch"]
    corrupted: Float[Array, " batch"]
    restored: Float[Array, "layers batch"]
    windows: Bool[Array, "layers layers"]

    __repr__ = short_repr

    @property
    def indirect_effect(self) -> Float[Array, "layers batch"]:
        """Return the indirect effect of each window on each example."""
        return self.restored - self.corrupted[None]


@on_auto_axes
def causal_trace(
    apply: Apply,
    params: PyTree,
    batch: Batch,
    *,
    corruption: Corruption,
    restoration: Restoration,
    key: Key[Array, ""],
    chunk: int = 8,
) -> CausalTrace:
    """Trace which layers bring an answer back after its subject was made unreadable.

    Costs one forward pass, and of each draw one more than there are layers; compiled once.

    Args:
        apply: `apply(params, tokens) -> logits`.
        params: the model's parameters.
        batch: inputs with answers as targets; `mask` says which outputs are the answer.
        corruption: the tokens that are made unreadable, and by how much noise.
        restoration: the layers whose outputs are put back, and where.
        key: key of the noise; an example's draw depends on its number in the batch alone.
        chunk: number of passes made at a time; 8 is arbitrary.

    Returns:
        The probabilities, and the windows.

    Raises:
        TypeError: an argument of another type.
        ValueError: a chunk below one; a name that is no site, or one whose output does not lead
            with (batch, seq).
    """
    check_numbers(COUNT, chunk=chunk)
    check_kind(corruption, Corruption, "corruption", "such as Corruption(embedding, subject)")
    check_kind(restoration, Restoration, "restoration", "such as Restoration(layers)")
    check_function(apply)
    check_params(params)
    check_batch(batch, "batch")
    check_key(key)
    layers, subject, positions = restoration.layers, corruption.subject, restoration.positions
    return _trace(
        apply,
        corruption.embedding,
        (layers,) if isinstance(layers, str) else tuple(layers),
        isinstance(layers, str),
        (restoration.window, corruption.samples, chunk),
        params,
        batch,
        subject,
        subject if positions is None else positions,
        corruption.noise,
        key,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _trace(
    apply, embedding, names, is_stacked, sizes, params, batch, subject, put_back, noise, key
) -> CausalTrace:
    window, samples, chunk = sizes
    clean = intervene(apply, params, batch.inputs)
    if unknown := [name for name in (embedding, *names) if name not in clean.site_outputs]:
        raise ValueError(
            f"{unknown} are no sites of this function; {nearest(unknown[0], clean.site_outputs)}"
        )
    alignments = align(trace_program(apply, params, batch.inputs), clean.outputs.shape[:-1])
    for name in (embedding, *names):
        if not alignments[name].leads_with_outputs(int(is_stacked and name != embedding)):
            shape = clean.site_outputs[name].shape
            raise ValueError(
                f"the output {shape} of the site {name!r} does not begin with the axes (batch, seq)"
                f" of the outputs {clean.outputs.shape}, so a token's place in it is unknown"
            )
    outputs = {name: clean.site_outputs[name] for name in names}
    num_layers = len(outputs[names[0]]) if is_stacked else len(names)
    embedded = clean.site_outputs[embedding]
    scale = (noise * _deviation(embedded, subject)).astype(embedded.dtype)
    windows = _windows(num_layers, window)

    def draw(sample):
        def one(example):
            # Folded in by number, not split by the batch's size: a row added to the batch leaves
            # the other rows' noise as it was.
            own = jax.random.fold_in(jax.random.fold_in(key, sample), example)
            return jax.random.normal(own, embedded.shape[1:], embedded.dtype)

        drawn = jax.vmap(one)(jnp.arange(len(embedded)))
        return jnp.where(subject[..., None], scale * drawn, 0)

    def run(case):
        row, sample = case
        masks = [is_in & put_back[..., None] for is_in in row]
        masks = [jnp.stack(masks)] if is_stacked else masks
        replace = {n: (m, outputs[n]) for n, m in zip(names, masks, strict=True)}
        added = {embedding: draw(sample)}
        found = intervene(apply, params, batch.inputs, add=added, replace=replace)
        return _probability(found.outputs, batch)

    # The corrupted run is the window that puts nothing back, so that it shares its draws of noise
    # with the restored ones, whose difference is then free of them.
    rows = jnp.concatenate([jnp.zeros((1, num_layers), bool), windows])
    cases = (jnp.repeat(rows, samples, axis=0), jnp.tile(jnp.arange(samples), len(rows)))
    # All cases run one program: masks say what is put back, since a program for each window would
    # compile as often as there are layers.
    probabilities = jax.lax.map(run, cases, batch_size=chunk)
    means = jnp.mean(probabilities.reshape(len(rows), samples, -1), axis=1)
    return CausalTrace(_probability(clean.outputs, batch), means[0], means[1:], windows)


def _windows(num_layers: int, window: int) -> Bool[Array, "layers layers"]:
    """Return ROME's windows: `window` layers from l - window // 2 on, as far as there are any."""
    first = jnp.arange(num_layers)[:, None] - window // 2
    layer = jnp.arange(num_layers)[None]
    return (layer >= first) & (layer < first + window)


def _deviation(embedded: Array, subject: Array) -> Array:
    """Return the deviation over all coordinates of the subjects' tokens, in float32 or wider."""
    embedded = wide(embedded)
    weight = jnp.broadcast_to(subject[..., None], embedded.shape).astype(embedded.dtype)
    count = jnp.maximum(jnp.sum(weight), 1)
    mean = jnp.sum(weight * embedded) / count
    return jnp.sqrt(jnp.sum(weight * (embedded - mean) ** 2) / count)


def _probability(logits: Array, batch: Batch) -> Float[Array, " batch"]:
    nll, counted = counted_nll(lambda _, __: logits, None, batch)
    nll, counted = (x.reshape(len(x), -1) for x in (nll, counted))
    number = jnp.maximum(jnp.sum(counted, axis=1), 1).astype(nll.dtype)
    return jnp.exp(-jnp.sum(nll, axis=1) / number)
