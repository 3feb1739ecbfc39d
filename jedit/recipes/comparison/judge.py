"""What an edited model is judged by: every metric of a point, from one forward pass."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.data import batches
from jedit.metrics import forget_quality
from jedit.objectives import token_kl, token_nll
from jedit.objectives.token_nll import labelled_values
from jedit.recipes.comparison.task import Task
from jedit.recipes.fitting import rows_of
from jedit.report import NumJudged, Point


def probe_batch(batch: Batch, num_rows: int | None) -> Batch:
    """The first rows of a batch; None: all."""
    return jax.tree.map(lambda x: x[:num_rows], batch)


class Judge:
    """Measures any params on the task's sets.

    What `jedit.metrics` gives one by one comes out of one forward pass here, a half of the time.
    """

    def __init__(self, task: Task, lost_kl: float):
        self.task, self.lost_kl = task, lost_kl
        names = ("forget", "retain", "heldout", "test")
        self.sets = {
            name: list(batches(_judged(task, name), task.chunk))
            for name in names
            if getattr(task, name) is not None
        }
        self.num_judged = NumJudged(
            *(rows_of(_shown(task, name)) for name in ("forget", "heldout"))
        )
        self.reference = (
            None if task.truth_ratio is None else _finite(task.truth_ratio(task.retrained))
        )

    def __call__(
        self, params: PyTree, strength: float, seconds: float, **predictions: float
    ) -> Point:
        """Judge params that an edit of this strength made in so many seconds."""
        task, apply = self.task, self.task.apply
        values: dict[str, float | None] = {}
        references = {"heldout": task.original, "forget": task.retrained}
        for name, chunks in self.sets.items():
            reference = references.get(name)
            sums = [_sums(apply, params, reference, chunk) for chunk in chunks]
            totals = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
            loss, hits, divergence, count = totals.tolist()
            values[f"{name}_nll"] = loss / count
            values[f"{name}_accuracy"] = hits / count
            if reference is not None:
                values[f"{name}_kl"] = divergence / count
        if task.truth_ratio is not None and self.reference is not None:
            ratios = _finite(task.truth_ratio(params))
            values["truth_ratio"] = float(np.mean(ratios))
            values["forget_quality"] = forget_quality(ratios, self.reference)
        # An edited model this far off has lost its utility; asking it costs the most.
        is_lost = strength > 0 and (values["heldout_kl"] or 0) > self.lost_kl
        if task.utility is not None and not is_lost:
            values["model_utility"] = task.utility(params)
        return Point(strength=strength, edit_seconds=seconds, **values, **predictions)  # type: ignore[arg-type]


def _shown(task: Task, name: str) -> Batch:
    rows = getattr(task, name)
    return rows if name == "forget" else probe_batch(rows, task.judged_rows)


def _judged(task: Task, name: str) -> Batch:
    rows = _shown(task, name)
    return rows if task.pack is None else task.pack(rows)


@functools.partial(jax.jit, static_argnames="apply")
def _sums(apply: Callable, params: PyTree, reference: PyTree | None, batch: Batch) -> Array:
    """Loss, hits, KL(reference || params) and number of counted outputs, from one forward pass."""

    def values(logits, targets, counted, *before):
        loss = token_nll(logits, targets)
        hits = (jnp.argmax(logits, axis=-1) == targets).astype(loss.dtype)
        divergence = token_kl(before[0], logits) if before else jnp.zeros_like(loss)
        rows = (loss, hits, divergence, jnp.ones_like(loss))
        return jnp.stack([jnp.where(counted, row, 0) for row in rows], axis=-1)

    others = () if reference is None else (reference,)
    found = labelled_values(values, apply, params, batch, *others)
    return jnp.sum(found, axis=tuple(range(found.ndim - 1)))


def _finite(ratios: np.ndarray) -> np.ndarray:
    # To a destroyed model a wrong answer can be infinitely likelier than a right one; the test
    # looks at ranks alone.
    return np.nan_to_num(ratios, nan=1e30, posinf=1e30)
