"""How much of an edit relearning takes back, component by component of hidden states (2605.11685).

    C v_i = c_i v_i                              C = cov of h_o over the positions that count
    change_i   = mean ⟨h_u - h_o, v_i⟩²          how far the edit went along v_i
    reverted_i = Σ ⟨h_l - h_u, v_i⟩⟨h_o - h_u, v_i⟩ / Σ ⟨h_o - h_u, v_i⟩²
    ratio_i    = Σ ⟨h_l - h_r, v_i⟩⟨h_u - h_o, v_i⟩ / Σ ⟨h_u - h_o, v_i⟩²

    h_o, h_u, h_l, h_r   states of the original, the unlearned, the relearned (attacked) and the
                         retrained model                       `models`

`ratio` is MCU's recovery of a component, ⟨h_l - h_r, v⟩ / ⟨h_u - h_o, v⟩ [notes], of all rows at
once by least squares (ours). As it stands it says where the attacked model is, and not what the
attack did: 0 where that is where the retrained one is, and before any attack ⟨h_u - h_r, v⟩ over
the edit, which is not 0 unless the edit hit the retrained model; of an edit that did, and that the
attack takes back whole, it is -1. `reverted` is what seems meant, and needs no retrained model: 0
where nothing came back, 1 where the edit is undone, whichever way it went [derived].
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.display import short_repr
from jedit.core.outputs import counted_outputs
from jedit.objectives.hidden_states import Hidden


class ComponentRecovery(NamedTuple):
    """What came back of an edit, by component of the original states, the largest first.

    Where the edit moved nothing along a component, its shares are NaN.

    Attributes:
        variance: c_i, of the original model's states along each component.
        change: mean square of the edit's change along it.
        reverted: share of that change that relearning took back; 1: all.
        ratio: MCU's ratio; None: no retrained model was given.
    """

    variance: Float[np.ndarray, " width"]
    change: Float[np.ndarray, " width"]
    reverted: Float[np.ndarray, " width"]
    ratio: Float[np.ndarray, " width"] | None

    __repr__ = short_repr

    def band(self, start: int, stop: int | None) -> float:
        """Return the share taken back of the change along the components start to stop, as one."""
        change = self.change[start:stop]
        known = change > 0
        if not known.any():
            return float("nan")
        return float(np.sum((self.reverted[start:stop] * change)[known]) / np.sum(change))


def recovery_by_component(
    hidden: Hidden,
    apply: Apply,
    models: Sequence[PyTree],
    rows: Batch,
) -> ComponentRecovery:
    """Measure along which directions of hidden states relearning undoes an edit.

        hidden = jedit.tracing.Leaving("blocks/1/mlp/down/kernel")
        found = recovery_by_component(hidden, apply, (original, edited, attacked, retrained), rows)
        found.band(0, 8), found.band(8, None)  # the top components, and the rest

    Args:
        hidden: `(apply, params, inputs) -> states`.
        apply: `apply(params, inputs) -> outputs`.
        models: parameters of the original, the unlearned and the relearned model, and of the
            retrained one, which may be left out.
        rows: forget rows; the positions that count are looked at, one forward pass a model, all
            rows at once.

    Returns:
        By component, in float64.

    Raises:
        ValueError: there are not three models or four, the rows count no position, or the states
            do not have the mask's positions.
        FloatingPointError: states that are not finite.
    """
    check_batch(rows, "rows")
    if len(models) not in (3, 4):
        raise ValueError(
            "models must be the original, the unlearned, the relearned and, if there is one, the "
            f"retrained one's parameters; got {len(models)}"
        )
    found = [_states(hidden, apply, params, rows) for params in models]
    eps = float(max(jnp.finfo(x.dtype).eps for x in found))
    states = [np.asarray(x, np.float64) for x in found]
    counted = np.asarray(counted_outputs(rows, states[0].shape[:-1]))
    if not counted.any():
        raise ValueError("the rows count no position: mask and valid leave out all")
    states = [x[counted] for x in states]
    if not all(np.isfinite(x).all() for x in states):
        raise FloatingPointError("the hidden states of a model are not finite")
    original, unlearned, relearned, *retrained = states
    centred = original - original.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    edit = (unlearned - original) @ vectors
    squares = np.sum(edit**2, axis=0)
    # Of a direction along which only rounding moved there is no share: rounding moves each entry by
    # at most half an eps of itself, and all directions alike.
    floor = np.sum(original**2) * eps**2 / len(values)
    is_moved = squares > floor

    def share(change: np.ndarray, along: np.ndarray) -> np.ndarray:
        products = np.sum((change @ vectors) * along, axis=0)
        return np.where(is_moved, products / np.where(is_moved, squares, 1), np.nan)

    return ComponentRecovery(
        variance=values,
        change=np.where(is_moved, squares / len(edit), 0),
        reverted=share(relearned - unlearned, -edit),
        ratio=share(relearned - retrained[0], edit) if retrained else None,
    )


def _states(hidden: Hidden, apply: Apply, params: PyTree, rows: Batch) -> Array:
    return jax.jit(hidden, static_argnums=(0,))(
        apply, params, jax.tree.map(np.asarray, rows.inputs)
    )
