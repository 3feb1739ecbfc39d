"""Trust regions: how far a step may go before the retain outputs have moved by a stated KL.

    KL(θ₀ ‖ θ₀ + α d) ≈ ½ α² dᵀF d <= ε      =>      α = sqrt(2 ε / dᵀF d)

and then the truth: a few evaluations of the KL itself, by bracketing and false position. On a
memorised model the quadratic is wrong by orders of magnitude; hence both numbers are returned.

The truth is that of the parameters as they will be, rounded to their own dtype. Beside θ₀ an
evaluation holds what moves, once more, and the outputs of one batch.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.arguments import batch_list, check_function, check_params, refuse_tracers
from jedit.core.batch import Batch
from jedit.core.checks import COUNT_OR_ZERO, POSITIVE, check_finite, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import check_contents, counted_outputs
from jedit.core.paths import parameter_paths
from jedit.core.precision import exponents, shifted, wide
from jedit.core.row_blocks import pieces_of
from jedit.curvature import Curvature, quadratic_form, quadratic_kl
from jedit.curvature.likelihoods import Likelihood, check_likelihood
from jedit.geometry.parts import ahead, moved, part_of, with_part

MAX_SCALE = 1e6  # of a step that seems to cost nothing; arbitrary
MAX_EVALUATIONS = 12  # of the retain KL in one line search; arbitrary, 5 to 8 are the rule
KEPT_BYTES = 2**28  # of θ₀'s outputs, on all retain rows; arbitrary


class TrustRegionInfo(NamedTuple):
    """The predicted and the true cost of a scaled step, in nats per counted output.

    Attributes:
        scale: α, the factor of the step.
        predicted_kl: ½ α² dᵀG d, by the matrix-free Gauss-Newton matrix of the retain outputs.
        true_kl: KL(θ₀ ‖ θ₀ + α d) on the retain rows.
    """

    scale: float
    predicted_kl: float
    true_kl: float


@on_auto_axes
def scale_to_kl_budget(
    apply: Callable,
    params: PyTree,
    step: PyTree,
    retain: Batch | Sequence[Batch],
    *,
    budget: float,
    likelihood: Likelihood,
    curvature: Curvature | None = None,
) -> tuple[PyTree, TrustRegionInfo]:
    """Scale a step so that the true retain KL is `budget`, to one percent, and never above.

    Not to be traced: the number of evaluations depends on what they say.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: θ₀, where the step begins.
        step: d, a change of params, of any length but zero: a tree like params, or some of its
            leaves by path. Leaves that are zero throughout, as `solve` makes those that no
            curvature covers, cost no memory in the search.
        retain: rows on which the KL is measured, one batch or several.
        budget: ε, nats per counted output.
        likelihood: what the outputs mean.
        curvature: gives the first guess; None: the matrix-free Gauss-Newton product does.

    Returns:
        α d in float32 or wider, and what was found; no entry of α d is above about 1e6, for steps
        that cost nothing at any length.

    Raises:
        ValueError: a budget that is not positive, retain batches that count no output, or a step
            that is not shaped like params.
    """
    check_numbers(POSITIVE, budget=budget)
    price = RetainKl(apply, params, retain, likelihood=likelihood)
    for number, batch in enumerate(price.batches):
        check_contents(batch, f"batch {number} of retain", must_count=False)
    check_finite("the step", step)
    nonzero = _is_nonzero(step)
    move = {path: d for path, d in dict(parameter_paths(step)).items() if nonzero[path]}
    with_part(params, move)  # refuses another shape
    # Of entries of about one: squares of a short step, or of a long one, leave the dtype.
    shift = exponents(move) if move else {}
    move = shifted(move, jax.tree.map(jnp.negative, shift))
    exponent = int(next(iter(shift.values()), 0))
    step = with_part(step, move)
    if curvature is None:
        quadratic = price.predicted(move)
    else:
        quadratic = 0.5 * float(quadratic_form(curvature, step))
    # A quadratic of nearly nothing would divide to infinity: the floor leaves MAX_SCALE.
    start = math.sqrt(budget / max(quadratic, budget * 1e-12))
    start = min(start, MAX_SCALE)
    scale = largest_step_within(functools.partial(price, move), start, budget, limit=MAX_SCALE)
    move = ahead({}, move, scale)
    scaled = with_part(jax.tree.map(wide, step), move)
    alpha = math.ldexp(scale, -exponent)
    return scaled, TrustRegionInfo(alpha, price.predicted(move), price(move))


class RetainKl:
    """A function that prices a change of parameters: KL(θ₀ ‖ θ) on the retain batches.

    θ₀'s outputs are kept if those of all batches are `kept_bytes` at most. Beyond that they are
    computed anew for each batch and each evaluation, by the same program: the numbers are the
    same, to the bit, and an evaluation costs two forward passes instead of one. Batches with large
    outputs are gone through in blocks of rows (`jedit.core.row_blocks`).

    Attributes:
        batches: the retain batches, on which the KL is measured.
    """

    @on_auto_axes
    def __init__(
        self,
        apply: Callable,
        params: PyTree,
        retain: Batch | Sequence[Batch],
        *,
        likelihood: Likelihood,
        kept_bytes: int = KEPT_BYTES,
    ):
        """Compute θ₀'s outputs, where they are to be kept.

        Args:
            apply: `apply(params, inputs) -> outputs`.
            params: θ₀, whose outputs are kept as the reference.
            retain: the rows on which the KL is measured, one batch or several.
            likelihood: what the outputs mean.
            kept_bytes: how many bytes of outputs are kept, on the device. 256 MiB, arbitrary: the
                logits of 2,000 tokens at a vocabulary of 32,000.

        Raises:
            TypeError: an argument is something else.
            ValueError: the batches count no output, there are none, or something is traced.
        """
        check_numbers(COUNT_OR_ZERO, kept_bytes=kept_bytes)
        check_function(apply)
        check_likelihood(likelihood)
        check_params(params)
        self.batches = batch_list(retain, "retain")
        refuse_tracers("a retain KL", (params, self.batches), "measure it outside")
        self._apply, self._likelihood, self._params = apply, likelihood, params
        self._pieces = [p for batch in self.batches for p in pieces_of(apply, params, batch)]
        self._counts = [num_counted(apply, likelihood, params, piece) for piece in self._pieces]
        if not sum(self._counts):
            raise ValueError(
                f"the {len(self.batches)} retain batches count no output, so no KL can be measured"
            )
        sizes = [_num_bytes(apply, params, piece) for piece in self._pieces]
        self._base = None
        if sum(sizes) <= kept_bytes:
            self._base = [_outputs(apply, params, piece) for piece in self._pieces]

    @on_auto_axes
    def __call__(
        self,
        move: Mapping[str, Array],
        alpha: float = 1.0,
        *,
        start: Mapping[str, Array] | None = None,
    ) -> float:
        """Return the true KL at θ₀ + start + alpha·move, rounded to θ₀'s dtypes.

        Nats per counted output.

        Args:
            move: changes by path; parameters that it leaves out stay.
            alpha: how many times the move is made.
            start: the change that the move begins at, by path; None: none.

        Raises:
            ValueError: a change of a path that θ₀ lacks, or of another shape.
        """
        start = start or {}
        for part in (start, move):
            with_part(self._params, part)  # refuses another path or shape
        # Leaf by leaf, so that nothing of the move's size is there in float32 but the move.
        there = with_part(
            self._params,
            {
                path: _moved_leaf(param, start.get(path), move.get(path), alpha)
                for path, param in part_of(self._params, {**start, **move}).items()
            },
        )

        def kl(i: int):
            piece = self._pieces[i]
            base = self._base[i] if self._base else _outputs(self._apply, self._params, piece)
            return _mean_kl(self._apply, self._likelihood, there, base, piece)

        return self._mean(kl(i) for i in range(len(self._pieces)))

    @on_auto_axes
    def predicted(self, change: Mapping[str, Array]) -> float:
        """Return the second-order KL of a change from θ₀, by path."""
        return self._mean(
            _predicted_kl(self._apply, self._likelihood, self._params, piece, change)
            for piece in self._pieces
        )

    def _mean(self, values) -> float:
        weighted = (float(v) * n for v, n in zip(values, self._counts, strict=True) if n)
        return sum(weighted) / sum(self._counts)


def num_counted(apply: Callable, likelihood: Likelihood, params: PyTree, batch: Batch) -> int:
    """Return how many outputs a batch counts."""
    lead = likelihood.lead_shape(jax.eval_shape(apply, params, batch.inputs))
    return int(jnp.sum(counted_outputs(batch, lead)))


def _num_bytes(apply: Callable, params: PyTree, batch: Batch) -> int:
    shape = jax.eval_shape(apply, params, batch.inputs)
    return math.prod(shape.shape) * shape.dtype.itemsize


@functools.partial(jax.jit, static_argnames="apply")
def _outputs(apply, params, batch):
    return apply(params, batch.inputs)


@jax.jit
def _moved_leaf(param, start, move, alpha):
    begun = {} if start is None else {"": start}
    step = {} if move is None else {"": move}
    return moved({"": param}, ahead(begun, step, alpha))[""]


@functools.partial(jax.jit, static_argnames=("apply", "likelihood"))
def _mean_kl(apply, likelihood, there, base, batch):
    """Return the mean KL of the original outputs from the moved params', over counted outputs."""
    outputs = apply(there, batch.inputs)
    counted = counted_outputs(batch, likelihood.lead_shape(outputs))
    kl = jnp.where(counted, likelihood.kl(base, outputs), 0)
    return jnp.sum(kl) / jnp.maximum(jnp.sum(counted), 1).astype(kl.dtype)


@functools.partial(jax.jit, static_argnames=("apply", "likelihood"))
def _predicted_kl(apply, likelihood, params, batch, change):
    """Return `quadratic_kl` of the parameters that change: no others have tangents."""
    part = part_of(params, change)
    tangents = {path: change[path].astype(p.dtype) for path, p in part.items()}

    def partial_apply(part, inputs):
        return apply(with_part(params, part), inputs)

    return quadratic_kl(partial_apply, part, batch, tangents, likelihood=likelihood)


@jax.jit
def _is_nonzero(step: PyTree):
    return {path: jnp.any(d != 0) for path, d in dict(parameter_paths(step)).items()}


def largest_step_within(
    kl_at: Callable[[float], float], start: float, allowed: float, *, limit: float = math.inf
) -> float:
    """Return the largest α <= limit with KL(α) <= allowed, to one percent.

    sqrt(KL), which is nearly linear in α where the quadratic model holds, is followed by false
    position in a bracket; a value that is not finite counts as too large. What is returned was
    evaluated and is within.
    """
    # KL(0) is not zero where the move begins at a change of its own, so that it is measured.
    inside, low = 0.0, math.sqrt(max(kl_at(0.0), 0.0))
    outside, high = math.inf, math.inf
    target = math.sqrt(allowed)
    alpha = start
    for _ in range(MAX_EVALUATIONS):
        value = kl_at(alpha)
        root = math.sqrt(max(value, 0.0)) if math.isfinite(value) else math.inf
        if root <= target:
            inside, low = alpha, root
            # Half a percent of the root is one of the KL.
            if root >= 0.995 * target or alpha >= limit:
                break
        else:
            outside, high = alpha, root
        # Not bracketed yet: as the quadratic says and a little more, but at most four times as far,
        # as a memorised model's KL explodes.
        if math.isinf(outside):
            alpha = min(inside * min(4.0, max(1.2, 1.1 * target / max(low, 1e-30))), limit)
        elif math.isinf(high) or inside == 0.0:
            alpha = inside + (outside - inside) * (0.2 if math.isinf(high) else 0.5)
            if inside == 0.0 and not math.isinf(high):
                alpha = outside * 0.95 * target / high
        else:
            # Aimed at the middle of what is accepted; never at an end of the bracket, where false
            # position creeps.
            share = (0.9975 * target - low) / (high - low)
            alpha = inside + (outside - inside) * min(0.95, max(0.05, share))
    return inside
