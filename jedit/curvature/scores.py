"""One captured pass over a batch: per block, what entered and what flowed back, example by example.

K-FAC, EK-FAC and the diagonal differ only in what they sum, so what they sum over is made here once:

    a (layers, examples, positions, d_in)     inputs, zero at padded positions
    g (layers, examples, positions, d_out)    gradient of the summed loss at the site's output, for
                                              labels of the model's own (or given, or all of them)
    v (layers or 1, examples, positions)      whether the position is data
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.capture import Capture, Site, run_capture
from jedit.curvature.likelihoods import Likelihood, output_mask
from jedit.typing import Batch, wide_dtype

FISHERS = ("sampled", "exact", "empirical")


@dataclasses.dataclass(frozen=True)
class Pass:
    """A captured batch, ready to be summed.

    Attributes:
        captured: the capture.
        lead: the outputs' leading shape: (examples,) or (examples, positions).
        valid: which positions are data, (lead); None when all are.
        counted: which outputs count in the loss, (lead).
        dtype: in which sums accumulate, float32 or wider.
        cotangents: number of pullbacks, and the function from its index to a cotangent.
    """

    captured: Capture
    lead: tuple[int, ...]
    valid: Array | None
    counted: Array
    dtype: jnp.dtype
    cotangents: tuple[int, Callable[[int | Array], Array]]

    @property
    def num_outputs(self) -> Array:
        """How many outputs the batch counts."""
        return jnp.sum(self.counted, dtype=jnp.int32)

    def inputs(self, site: Site) -> tuple[Array, Array | None]:
        """(a, v); token indices (layers, examples, positions) for an embedding. v None: all ones."""
        a = site.canonical_inputs(self.captured.activations[site.name])
        features = 0 if site.kind == "embedding" else 1
        positions = a.shape[1 : a.ndim - features]
        v = self._valid(site, positions)
        a = _by_example(a, self.lead, positions)
        if site.kind == "embedding":
            return a, v
        a = a.astype(self.dtype)
        return (a if v is None else jnp.where(v[..., None], a, jnp.zeros((), a.dtype))), v

    def gradients(self, site: Site, pulled: dict[str, Array]) -> Array:
        """g out of one pullback."""
        g = site.canonical_gradients(pulled[site.name]).astype(self.dtype)
        return _by_example(g, self.lead, g.shape[1:-1])

    def poison(self, site: Site) -> Array:
        """Zero; not a number where padding cannot be told from data in this site.

        Added to what is summed, it makes `finalize` name the block: never a silently polluted moment.
        """
        zero = jnp.zeros((), self.dtype)
        if self.valid is None or is_matched(site, self.lead):
            return zero
        return jnp.where(jnp.all(self.valid.astype(bool)), zero, jnp.nan)

    def sum_over_cotangents(self, function: Callable[[dict[str, Array]], PyTree]) -> PyTree:
        """Sum `function(gradients of all sites)` over the pullbacks: draws, or classes."""
        number, cotangent = self.cotangents

        def one(k):
            return function(self.captured.pullback(cotangent(k)))

        if number == 1:
            return one(0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
        return jax.lax.fori_loop(
            0, number, lambda k, total: jax.tree.map(jnp.add, total, one(k)), zeros
        )

    def _valid(self, site: Site, positions: tuple[int, ...]) -> Array | None:
        """(layers or 1, examples, positions) booleans; None when every position is data."""
        ran = None
        if site.branch is not None:
            ran = self.captured.ran[site.branch] > 0
            shape = (*ran.shape, *(1 for _ in range(len(site.output_shape) - ran.ndim)))
            ran = jnp.broadcast_to(ran.reshape(shape), site.output_shape)
            ran = site.canonical_gradients(ran)[..., 0]
            ran = _by_example(ran, self.lead, ran.shape[1:])
        if self.valid is None:
            return ran
        valid = self.valid.astype(bool)
        kind = match(positions, self.lead)
        if kind == "none":  # what is summed is poisoned unless all is data: see `poison`
            return ran
        if kind == "flat":
            valid = valid.reshape(1, *self.lead)
        else:
            rest = positions[len(self.lead) :]
            valid = valid.reshape(*self.lead, *(1 for _ in rest))
            valid = jnp.broadcast_to(valid, positions).reshape(1, self.lead[0], -1)
        return valid if ran is None else valid & ran


def match(positions: tuple[int, ...], lead: tuple[int, ...]) -> str:
    """How a site's positions correspond to outputs: "lead", "flat", "examples" or "none"."""
    if positions[: len(lead)] == lead:
        return "lead"
    if positions and len(lead) > 1 and positions[0] == _size(lead):
        return "flat"
    return "none"


def _size(shape: Iterable[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _by_example(x: Array, lead: tuple[int, ...], positions: tuple[int, ...]) -> Array:
    """(layers, positions..., features?) to (layers, examples, positions, features?)."""
    features = x.shape[1 + len(positions) :]
    is_matched = match(positions, lead) != "none" or (positions and positions[0] == lead[0])
    examples = lead[0] if is_matched else 1
    return x.reshape(x.shape[0], examples, -1, *features)


def is_matched(site: Site, lead: tuple[int, ...]) -> bool:
    """Whether a site's positions can be told from padding by the outputs' leading shape."""
    output = jax.ShapeDtypeStruct(site.output_shape, site.output_dtype)
    positions = jax.eval_shape(site.canonical_gradients, output).shape[1:-1]
    return match(positions, lead) != "none"


def run_pass(
    apply: Callable,
    likelihood: Likelihood,
    params: PyTree,
    batch: Batch,
    key: Array,
    first_example: Array,
    *,
    select=None,
    fisher: str = "sampled",
    samples: int = 1,
) -> Pass:
    """Capture one batch and prepare its cotangents.

    Args:
        apply: the model, `apply(params, inputs) -> outputs`.
        likelihood: what the outputs mean.
        params: where to linearise.
        batch: the examples; `targets` are read by `fisher="empirical"` alone.
        key: of the whole estimate, not of the batch: labels depend on it and on the example's id.
        first_example: id of the batch's first example, a running number.
        select: which parameters.
        fisher: "sampled", "exact" or "empirical".
        samples: number of draws for "sampled".

    Returns:
        The pass.

    Raises:
        ValueError: shapes of the batch disagree, an unknown `fisher`, a selected parameter that
            cannot be captured, or missing targets.
    """
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {', '.join(FISHERS)}, got {fisher!r}")
    captured = run_capture(apply, params, batch.inputs, select)
    if select is not None and captured.sites.uncovered:
        rows = "\n".join(f"  {p}: {r}" for p, r in captured.sites.uncovered.items())
        raise ValueError(f"select names parameters that cannot be captured:\n{rows}")
    if not captured.sites:
        raise ValueError(f"no parameter can be captured:\n{captured.sites}")
    outputs = captured.outputs
    lead = likelihood.lead_shape(outputs)
    counted = output_mask(batch, lead)
    if fisher == "sampled":
        ids = first_example + jnp.arange(lead[0], dtype=jnp.int32)

        def draw(k):
            noise = likelihood.noise(outputs, ids, key=jax.random.fold_in(key, k))
            return likelihood.sampled_cotangent(outputs, noise)

        number, cotangent = samples, draw
    elif fisher == "exact":
        # One output of an example at a time: labels of different outputs are independent, so the
        # cross terms that a joint backward pass would give have to be absent.
        columns = likelihood.num_columns(outputs)
        per_example = _size(lead[1:])
        number = columns * per_example

        def cotangent(k):
            column = likelihood.exact_cotangent(outputs, k % columns)
            here = jnp.arange(per_example).reshape(1, *lead[1:], 1) == k // columns
            return jnp.where(here, column, jnp.zeros((), outputs.dtype))

    else:
        if batch.targets is None:
            raise ValueError('fisher="empirical" needs batch.targets')
        number = 1

        def cotangent(_):
            return likelihood.empirical_cotangent(outputs, batch.targets)

    def masked(k):
        return jnp.where(counted[..., None], cotangent(k), jnp.zeros((), outputs.dtype))

    dtype = wide_dtype(outputs.dtype)
    return Pass(captured, lead, batch.valid, counted, dtype, (number, masked))
