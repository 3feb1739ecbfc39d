"""One captured pass over a batch: per site, what entered and what flowed back, example by example.

K-FAC, EK-FAC and the diagonal differ only in what they sum; what they sum over is made here once:

    a (layers, examples, positions, d_in)     inputs, zero at padded positions
    g (layers, examples, positions, d_out)    gradient of the summed loss at the site's output, for
                                              labels of the model's own (or given, or all of them)
    v (layers or 1, examples, positions)      whether the position is data
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.arguments import check_batch, check_params
from jedit.capture import Capture, Site, run_capture
from jedit.curvature.alignment import align_site, by_example, is_maskable, spread
from jedit.curvature.likelihoods import Likelihood, check_likelihood
from jedit.outputs import counted_outputs
from jedit.typing import Batch, wide_dtype

FISHERS = ("sampled", "exact", "empirical")

Total = TypeVar("Total")


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which labels the gradients are taken at.

    Attributes:
        likelihood: what the outputs mean.
        fisher: "sampled" from the model, "exact" (all of them) or "empirical" (the given ones).
        samples: draws, for "sampled".
    """

    likelihood: Likelihood
    fisher: str = "sampled"
    samples: int = 1

    def __post_init__(self) -> None:
        """Refuse what is unknown.

        Raises:
            TypeError: what is no likelihood.
            ValueError: an unknown `fisher`, or no draw.
        """
        check_likelihood(self.likelihood)
        if self.fisher not in FISHERS:
            raise ValueError(f"fisher must be one of {', '.join(FISHERS)}, got {self.fisher!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    @property
    def draws(self) -> int:
        """How many draws a batch's sums hold, to be divided by."""
        return self.samples if self.fisher == "sampled" else 1


@dataclasses.dataclass(frozen=True)
class Pass:
    """A captured batch, ready to be summed.

    Attributes:
        captured: the capture.
        lead: the outputs' leading shape, (examples, ...).
        valid: which positions are data, (lead) booleans; None when all are.
        counted: which outputs count in the loss, (lead) booleans.
        dtype: in which sums accumulate, float32 or wider.
        num_pullbacks: how often gradients flow back.
        cotangent: from the pullback's number to a cotangent of the outputs.
    """

    captured: Capture
    lead: tuple[int, ...]
    valid: Array | None
    counted: Array
    dtype: jnp.dtype
    num_pullbacks: int
    cotangent: Callable[[int | Array], Array]

    @property
    def num_outputs(self) -> Array:
        """How many outputs the batch counts."""
        return jnp.sum(self.counted, dtype=jnp.int32)

    def inputs(self, site: Site) -> tuple[Array, Array | None]:
        """(a, v); an embedding's a is token indices (layers, examples, positions). v None: all.

        In the dtype that the model computed in: a product of bfloat16 rows is exact in float32, and
        takes a device's fast path. What is not such a product has to widen them to `dtype` first.
        """
        a = site.canonical_inputs(self.captured.activations[site.name])
        num_features = 0 if site.kind == "embedding" else 1
        positions = a.shape[1 : a.ndim - num_features]
        v = self._valid(site, positions)
        a = by_example(a, positions, self.lead)
        if site.kind == "embedding":
            return a, v
        return self._only_valid(self._as_computed(a), v), v

    def gradients(self, site: Site, pulled: dict[str, Array]) -> Array:
        """The g of one pullback.

        A padded position's is zero in any case if the model takes nothing from it; it is set to
        zero for the sake of positions that hold no numbers, where zero times that is not zero.
        """
        raw = self._as_computed(pulled[site.name])
        if self.valid is not None and raw.shape[: len(self.lead)] == self.lead:
            # Before positions become features, as those of a table that is added to all examples.
            rest = (1,) * (raw.ndim - len(self.lead))
            raw = jnp.where(self.valid.reshape(*self.lead, *rest), raw, jnp.zeros((), raw.dtype))
        g = site.canonical_gradients(raw)
        positions = g.shape[1:-1]
        return self._only_valid(by_example(g, positions, self.lead), self._valid(site, positions))

    def poison(self, site: Site) -> Array:
        """Zero; not a number where there is padding that cannot be told from data in this site.

        Added to what is summed, it makes `finalize` name the block: no silently polluted moment.
        """
        zero = jnp.zeros((), self.dtype)
        if self.valid is None or is_maskable(site, self.lead):
            return zero
        return jnp.where(jnp.all(self.valid), zero, jnp.nan)

    def fold(self, step: Callable[[Total, dict[str, Array]], Total], total: Total) -> Total:
        """Fold `step(total, gradients of all sites)` over the pullbacks: draws, or labels."""

        def one(k, total):
            return step(total, self.captured.pullback(self.cotangent(k)))

        if self.num_pullbacks == 1:
            return one(0, total)
        return jax.lax.fori_loop(0, self.num_pullbacks, one, total)

    def _as_computed(self, x: Array) -> Array:
        """Narrower numbers than the sums' stay as they are, all others become as wide."""
        is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        return x if is_narrow else x.astype(self.dtype)

    @staticmethod
    def _only_valid(x: Array, v: Array | None) -> Array:
        return x if v is None else jnp.where(v[..., None], x, jnp.zeros((), x.dtype))

    def _valid(self, site: Site, positions: tuple[int, ...]) -> Array | None:
        """(layers or 1, examples, positions) booleans; None when every position is data."""
        valid = None if self.valid is None else spread(self.valid, positions)
        if site.branch is None:
            return valid
        ran = self.captured.ran[site.branch] > 0  # (scans...)
        rest = len(site.output_shape) - ran.ndim
        ran = jnp.broadcast_to(ran.reshape(*ran.shape, *(1,) * rest), site.output_shape)
        ran = by_example(site.canonical_gradients(ran)[..., 0], positions, self.lead)
        return ran if valid is None else valid & ran


def run_pass(
    apply: Callable,
    labels: Labels,
    params: PyTree,
    batch: Batch,
    key: Array,
    first_example: Array,
    select: str | Sequence[str] | None = None,
) -> Pass:
    """Capture one batch and prepare its cotangents.

    Args:
        apply: the model, `apply(params, inputs) -> outputs`.
        labels: at which labels.
        params: where to linearise.
        batch: the examples; `targets` are read by empirical labels alone.
        key: of the whole estimate, not of the batch: labels depend on it and on the example's id.
        first_example: id of the batch's first example, a running number.
        select: which parameters.

    Returns:
        The pass.

    Raises:
        TypeError: parameters or a batch that are something else.
        ValueError: shapes of the batch disagree or are empty, a selected parameter cannot be
            captured, or targets are missing.
    """
    check_pass(params, batch)
    captured = run_capture(apply, params, batch.inputs, select)
    sites, outputs = captured.sites, captured.outputs
    if select is not None and sites.uncovered:
        rows = "\n".join(f"  {path}: {reason}" for path, reason in sites.uncovered.items())
        raise ValueError(f"select names parameters that cannot be captured:\n{rows}")
    if not sites:
        raise ValueError(f"no parameter can be captured:\n{sites}")
    for site in sites.values():
        if 0 in site.weight.shape:
            raise ValueError(
                f"parameter {site.path!r} has shape {site.weight.shape}, an axis of no length; "
                "leave it out by `select`"
            )
    lead = labels.likelihood.lead_shape(outputs)
    _check_examples(batch, lead)
    counted = counted_outputs(batch, lead)
    number, cotangent = _cotangents(labels, captured, batch, key, first_example, lead)

    def masked(k):
        return jnp.where(counted[..., None], cotangent(k), jnp.zeros((), outputs.dtype))

    valid = None if batch.valid is None else batch.valid.astype(bool)
    return Pass(captured, lead, valid, counted, wide_dtype(outputs.dtype), number, masked)


def check_pass(params: PyTree, batch: Batch) -> None:
    """Refuse what cannot be traced, before JAX does so in words of its own.

    Raises:
        TypeError: parameters or a batch that are something else.
    """
    check_params(params)
    check_batch(batch, "batch")


def _check_examples(batch: Batch, lead: tuple[int, ...]) -> None:
    """Refuse outputs or targets that do not lead with the inputs' examples.

    Raises:
        ValueError: they do not.
    """
    lengths = {jnp.shape(x)[0] for x in jax.tree.leaves(batch.inputs) if jnp.ndim(x) > 0}
    if not lead or lengths - {lead[0]}:
        raise ValueError(
            f"the outputs' leading shape is {lead}, but the inputs lead with "
            f"{', '.join(map(str, sorted(lengths)))} examples; apply must return outputs "
            "(examples, ..., classes or features), not flattened"
        )
    if 0 in lead:
        raise ValueError(
            f"the batch is empty: the outputs' leading shape is {lead}, inputs and all"
        )
    if batch.targets is not None and batch.targets.shape[:1] != lead[:1]:
        raise ValueError(
            f"batch.targets has shape {batch.targets.shape}, but the batch has {lead[0]} examples"
        )


def _cotangents(
    labels: Labels, captured: Capture, batch: Batch, key, first_example, lead: tuple[int, ...]
) -> tuple[int, Callable[[int | Array], Array]]:
    """How many pullbacks, and the cotangent of each.

    Raises:
        ValueError: empirical labels without targets.
    """
    likelihood, outputs = labels.likelihood, captured.outputs
    if labels.fisher == "sampled":
        ids = first_example + jnp.arange(lead[0], dtype=jnp.int32)

        def draw(k):
            noise = likelihood.noise(outputs, ids, key=jax.random.fold_in(key, k))
            return likelihood.sampled_cotangent(outputs, noise)

        return labels.samples, draw
    # Squares of sums over examples would hold cross terms, which sampled labels have none of, being
    # independent. So where a site cannot tell examples apart, they flow back one by one.
    is_merged = any(align_site(site, lead) == "none" for site in captured.sites.values())
    if labels.fisher == "exact":
        # One output at a time, for the same reason.
        columns = likelihood.num_columns(outputs)
        shape = lead if is_merged else (1, *lead[1:])

        def column(k):
            is_here = jnp.arange(math.prod(shape)).reshape(*shape, 1) == k // columns
            cotangent = likelihood.exact_cotangent(outputs, k % columns)
            return jnp.where(is_here, cotangent, jnp.zeros((), outputs.dtype))

        return columns * math.prod(shape), column
    targets = batch.targets
    if targets is None:
        raise ValueError('fisher="empirical" needs batch.targets')

    def given(k):
        cotangent = likelihood.empirical_cotangent(outputs, targets)
        if not is_merged:
            return cotangent
        is_here = jnp.arange(lead[0]).reshape(-1, *(1,) * len(lead)) == k
        return jnp.where(is_here, cotangent, jnp.zeros((), outputs.dtype))

    return (lead[0] if is_merged else 1), given
