"""One captured pass over a batch: per site, what entered and what flowed back, example by example.

K-FAC, EK-FAC and the diagonal differ only in what they sum; what they sum over is made here once:

    a (layers, examples, positions, d_in)     inputs, zero at padded positions
    g (layers, examples, positions, d_out)    gradient of the summed loss at the site's output, for
                                              labels of the model's own (or given, or all of them)
    v (layers or 1, examples, positions)      whether the position is data
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_batch, check_params, check_word
from jedit.core.batch import Batch
from jedit.core.checks import COUNT, check_numbers
from jedit.core.outputs import check_contents, counted_outputs
from jedit.core.precision import wide_dtype
from jedit.core.row_blocks import cut, num_blocks
from jedit.curvature.likelihoods import Likelihood, check_likelihood
from jedit.curvature.positions import Alignment, align
from jedit.tracing import Capture, Site, run_capture

Fisher = Literal["sampled", "exact", "empirical"]

Total = TypeVar("Total")
State = TypeVar("State", bound=Any)


class Examples(NamedTuple):
    """The ids of a batch's examples, which their labels depend on: first, first + step, ...

    Attributes:
        first: id of the first example, an int32.
        step: how far apart the ids are; more than one in a block of a batch's rows.
    """

    first: Array
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels at which gradients are taken.

    Attributes:
        likelihood: what the outputs mean.
        fisher: "sampled" from the model, "exact" (all of them) or "empirical" (the given ones).
        samples: how many labels are drawn for each output; read for "sampled" alone.
    """

    likelihood: Likelihood
    fisher: Fisher = "sampled"
    samples: int = 1

    def __post_init__(self) -> None:
        """Refuse another `fisher`, no draw, and what is no likelihood.

        Raises:
            TypeError: `likelihood` is no likelihood.
            ValueError: `fisher` is another word, or `samples` is below one.
        """
        check_numbers(COUNT, samples=self.samples)
        check_likelihood(self.likelihood)
        check_word(Fisher, fisher=self.fisher)

    def check(self, apply: Callable, params: PyTree, batch: Batch, name: str) -> None:
        """Refuse masks that are none and, where they are used, labels that are none.

        Raises:
            ValueError: masks or labels are refused by `check_contents`, or there are no rows; a
                batch that counts nothing passes.
        """
        if any(0 in np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch.inputs)):
            raise ValueError(f"{name} has no rows: the curvature is of no outputs then")
        limits = None
        if self.fisher == "empirical" and batch.targets is not None:
            limits = self.likelihood.label_limits(jax.eval_shape(apply, params, batch.inputs))
        check_contents(batch, name, limits=limits, must_count=False)

    @property
    def draws(self) -> int:
        """Return how many draws a batch's sums hold, to be divided by."""
        return self.samples if self.fisher == "sampled" else 1


@dataclasses.dataclass(frozen=True)
class Pass:
    """A captured batch, ready to be summed.

    Attributes:
        captured: the captured pass, with its activations and its pullback.
        alignments: by site, where its examples and outputs are.
        lead: the outputs' leading shape, (examples, ...).
        valid: which positions are data, (lead) booleans; None when all are.
        counted: which outputs count in the loss, (lead) booleans.
        dtype: the dtype in which sums accumulate, float32 or wider.
        num_pullbacks: how often gradients flow back.
        is_one_by_one: whether each pullback takes the gradients of one example alone.
        cotangent: a function from a pullback's number to a cotangent of the outputs.
    """

    captured: Capture
    alignments: Mapping[str, Alignment]
    lead: tuple[int, ...]
    valid: Array | None
    counted: Array
    dtype: jnp.dtype
    num_pullbacks: int
    is_one_by_one: bool
    cotangent: Callable[[int | Array], Array]

    @property
    def num_outputs(self) -> Array:
        """Return how many outputs the batch counts."""
        return jnp.sum(self.counted, dtype=jnp.int32)

    def inputs(self, site: Site) -> tuple[Array, Array | None]:
        """Return (a, v); an embedding's a is indices (layers, examples, positions). v None: all.

        They have the dtype that the model computed in: a product of bfloat16 rows is exact in
        float32, and takes a device's fast path. What is not such a product has to widen them to
        `dtype` first.
        """
        a = site.canonical_inputs(self.captured.activations[site.name])
        v = self._valid(site)
        a = self.alignments[site.name].by_example(a)
        if site.kind == "embedding":
            return a, v
        return self._only_valid(self._as_computed(a), v), v

    def gradients(self, site: Site, pulled: dict[str, Array]) -> Array:
        """Return the g of one pullback.

        At a padded position it is zero in any case if the model takes nothing from it; it is set to
        zero for the sake of positions that hold no numbers, where zero times that is not zero.
        """
        raw = self._as_computed(pulled[site.name])
        alignment = self.alignments[site.name]
        valid = None if self.valid is None else alignment.at_output(self.valid)
        if valid is not None:
            # Before positions become features, as those of a table that is added to all examples.
            raw = jnp.where(valid, raw, jnp.zeros((), raw.dtype))
        return self._only_valid(
            alignment.by_example(site.canonical_gradients(raw)), self._ran(site)
        )

    def one_group(self, sites: Sequence[Site]) -> bool:
        """Say whether the examples of these sites are one group, squared as a whole.

        Either there is but one that has a gradient, or some site cannot tell them apart: labels of
        different examples being independent, cross terms then have mean zero.
        """
        return self.is_one_by_one or any(
            self.alignments[site.name].example is None for site in sites
        )

    def poison(self, site: Site) -> Array:
        """Return zero, or NaN where there is padding that cannot be told from data in this site.

        Added to what is summed, it makes `finalize` name the block: no silently polluted moment.
        """
        zero = jnp.zeros((), self.dtype)
        if self.valid is None or self.alignments[site.name].is_maskable:
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
        """Leave numbers narrower than the sums' as they are, and make all others as wide."""
        is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        return x if is_narrow else x.astype(self.dtype)

    @staticmethod
    def _only_valid(x: Array, v: Array | None) -> Array:
        return x if v is None else jnp.where(v[..., None], x, jnp.zeros((), x.dtype))

    def _valid(self, site: Site) -> Array | None:
        """Return v (layers or 1, examples, positions), booleans; None: every position is data."""
        valid = None if self.valid is None else self.alignments[site.name].spread(self.valid)
        ran = self._ran(site)
        if valid is None or ran is None:
            return ran if valid is None else valid
        return valid & ran

    def _ran(self, site: Site) -> Array | None:
        """Return whether the site's branch of a `cond` ran, laid out as v; None: it is in none."""
        if site.branch is None:
            return None
        ran = self.captured.ran[site.branch] > 0  # (scans...)
        rest = len(site.output_shape) - ran.ndim
        ran = jnp.broadcast_to(ran.reshape(*ran.shape, *(1,) * rest), site.output_shape)
        return self.alignments[site.name].by_example(site.canonical_gradients(ran)[..., 0])


def run_pass(
    apply: Callable,
    labels: Labels,
    params: PyTree,
    batch: Batch,
    key: Array,
    examples: Examples,
    select: str | Sequence[str] | None = None,
) -> Pass:
    """Capture one batch and prepare its cotangents.

    Args:
        apply: the model, `apply(params, inputs) -> outputs`.
        labels: the labels at which gradients are taken.
        params: the parameters at which the model is linearised.
        batch: the examples; `targets` are read by empirical labels alone.
        key: the key of the whole estimate, not of the batch: labels depend on it and on the
            example's id.
        examples: the ids of the batch's examples, running numbers.
        select: regular expressions for the paths of the parameters; None: all.

    Returns:
        The captured batch.

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
    alignments = align(captured.program, lead)
    counted = counted_outputs(batch, lead)
    # Squares of sums over examples would hold cross terms, which sampled labels have none of, being
    # independent. So where a site cannot tell examples apart, they flow back one by one.
    is_merged = any(alignment.is_merged for alignment in alignments.values())
    is_one_by_one = is_merged and labels.fisher != "sampled"
    number, cotangent = _cotangents(
        labels, captured.outputs, batch, key, examples, lead, is_one_by_one
    )

    # Masked here and not in the loss, so that any likelihood's cotangent may be given.
    def masked(k):
        return jnp.where(counted[..., None], cotangent(k), jnp.zeros((), outputs.dtype))

    valid = None if batch.valid is None else batch.valid.astype(bool)
    return Pass(
        captured=captured,
        alignments=alignments,
        lead=lead,
        valid=valid,
        counted=counted,
        dtype=wide_dtype(outputs.dtype),
        num_pullbacks=number,
        is_one_by_one=is_one_by_one,
        cotangent=masked,
    )


def over_row_blocks(
    add: Callable[[State, Batch, Examples], State],
    apply: Callable,
    state: State,
    params: PyTree,
    batch: Batch,
) -> State:
    """Add a batch to a state of sums, in blocks of rows where its outputs are large.

    What is summed does not depend on the blocks, but for rounding, as it does not depend on how
    examples are cut into batches: every example keeps its id, and so its labels. The exception is
    that of `kfac`: sampled labels at a site whose entries influence several examples, such as
    GPT-2's lookup of positions, whose sums differ by noise of mean zero with the cut.

    Args:
        add: `(state, rows, ids of the rows) -> state`; it may leave `next_example` as it is.
        apply: the model, whose outputs' size says how many rows are taken at a time.
        state: the sums, with the running number `next_example`.
        params: the parameters.
        batch: the examples.

    Returns:
        The state with the batch added, `next_example` as well.
    """
    check_pass(params, batch)
    outputs = jax.eval_shape(apply, params, batch.inputs)
    number, first = num_blocks(outputs), state.next_example
    if number == 1:
        state = add(state, batch, Examples(first))
    else:

        def block(state: State, one: tuple[Batch, Array]) -> tuple[State, None]:
            rows, j = one
            # Block j has every so manieth row, from the j-th on, as `cut` takes them.
            return add(state, rows, Examples(first + j, number)), None

        parts = cut(batch, number), jnp.arange(number, dtype=jnp.int32)
        state = jax.lax.scan(block, state, parts)[0]
    return dataclasses.replace(state, next_example=first + outputs.shape[0])


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
        ValueError: some leaf has another number of examples.
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
    labels: Labels, outputs: Array, batch: Batch, key, examples, lead, is_one_by_one: bool
) -> tuple[int, Callable[[int | Array], Array]]:
    """Return how many pullbacks, and the cotangent of each.

    Raises:
        ValueError: the labels are empirical, and there are no targets.
    """
    likelihood = labels.likelihood
    if labels.fisher == "sampled":
        ids = examples.first + examples.step * jnp.arange(lead[0], dtype=jnp.int32)

        def draw(k):
            noise = likelihood.noise(outputs, ids, key=jax.random.fold_in(key, k))
            return likelihood.sampled_cotangent(outputs, noise)

        return labels.samples, draw
    if labels.fisher == "exact":
        # One output at a time, so that there are no cross terms between them.
        columns = likelihood.num_columns(outputs)
        shape = lead if is_one_by_one else (1, *lead[1:])

        # Pullback k is class k % columns of output k // columns; every example has its own at once,
        # unless examples cannot be told apart.
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
        if not is_one_by_one:
            return cotangent
        is_here = jnp.arange(lead[0]).reshape(-1, *(1,) * len(lead)) == k
        return jnp.where(is_here, cotangent, jnp.zeros((), outputs.dtype))

    return (lead[0] if is_one_by_one else 1), given
