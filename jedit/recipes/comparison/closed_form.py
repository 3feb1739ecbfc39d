"""The methods that give one edit without a search, as a comparison runs them: over its scale."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.curvature import Curvature
from jedit.edits import Edit
from jedit.geometry import null_space
from jedit.methods import Associations, Layers, alphaedit, curvature_engram, engram, memit

THRESHOLD = 0.01  # of AlphaEdit's null space, a share of the energy; 2e-2 of anything is arbitrary


class Editor(NamedTuple):
    """A method that gives one edit.

    Attributes:
        description: one sentence: what it does.
        edit: makes the edit; it is applied times a scale.
    """

    description: str
    edit: Callable[[], Edit]

    def timed(self) -> tuple[Edit, float]:
        """The edit, and the seconds it takes when all is compiled."""
        jax.block_until_ready(self.edit())
        start = time.perf_counter()
        edit = jax.block_until_ready(self.edit())
        return edit, time.perf_counter() - start


def make_editors(
    apply: Callable,
    params: PyTree,
    forget: Batch,
    target: Curvature,
    rest: Curvature,
    retained: Curvature,
    layers: tuple[str, ...],
) -> dict[str, Editor]:
    """Every such method, by name.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: to be edited.
        forget: rows to be forgotten.
        target: curvature of the forget rows, of a text at its answers' tokens alone, for engrams.
        rest: of the retain rows, likewise.
        retained: of the retain rows at all their tokens, for AlphaEdit and MEMIT.
        layers: paths of the matrices that AlphaEdit and MEMIT edit, by depth.

    Returns:
        The methods, which keep what they were given.
    """
    facts = Associations(forget, _last_prompt_token(forget))
    where = f"what {', '.join(layers)} answer to the last token of the forget rows' prompts"
    return {
        "engram": Editor(
            "Takes out of every weight the part that serves the forget rows' inputs.",
            lambda: engram(params, target, rest)[0],
        ),
        "engram (output metric)": Editor(
            "The same with errors weighed by the Fisher matrix of the outputs (ours).",
            lambda: curvature_engram(params, target, rest)[0],
        ),
        "AlphaEdit": Editor(
            f"Removes {where}, in the null space of the retain rows' inputs.",
            lambda: alphaedit(
                apply,
                params,
                null_space(retained, threshold=THRESHOLD),
                facts,
                None,
                layers=Layers(layers),
            )[0],
        ),
        "MEMIT": Editor(
            f"Removes {where}, by ridge regression against the retain rows' inputs.",
            lambda: memit(apply, params, retained, facts, None, layers=Layers(layers))[0],
        ),
    }


def _last_prompt_token(forget: Batch) -> Array | None:
    """Where the first counted output is read off; None for outputs without positions."""
    if forget.mask is None or forget.mask.ndim < 2:
        return None
    return jnp.argmax(jnp.asarray(forget.mask) > 0, axis=1).astype(jnp.int32)
