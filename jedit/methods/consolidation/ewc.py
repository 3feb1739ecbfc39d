"""EWC, elastic weight consolidation, in any of jedit's curvatures (Kirkpatrick et al. 2017).

    L(θ) = L_t(θ) + λ/2 Σ_i (θ - θ*)ᵀ F_i (θ - θ*)                     arXiv 1612.00796, equation 3

    F_i   Fisher matrix of task i's outputs, where it had been learnt       `anchored`
    θ*    parameters after the last task                                    `Anchor.params`
    λ     strength                                                          `with_retain(weight=)`

    with_retain(LearnNLL(), EWC(), weight=100.0)

Differences. The paper's F is diagonal: give `diagonal(...)`; with `kfac(...)` the same quadratic is
taken in Kronecker factors, which see how parameters of one layer move together [ours; Ritter et
al. 2018, arXiv 1805.07810, have the like as online structured Laplace].  The paper has a penalty
for every task, each around its own parameters: give the reference as a tuple of anchors, each made
without `before`.  One anchor with summed curvatures around the newest parameters is online EWC
(Schwarz et al. 2018, arXiv 1805.06370) without its decay, and costs the same at every task.  F is
the mean over all tasks' outputs, times the number of tasks, which is the sum where tasks have the
same number of outputs; labels are sampled from the model, where much released code takes the given
ones.  λ has no default: published ones are for other scales of F.  As a retain term
of unlearning it is that of Selective Amnesia (arXiv 2305.10120).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jedit.core.batch import Apply
from jedit.core.precision import wide
from jedit.curvature import quadratic_form
from jedit.methods.consolidation._anchor import Anchor
from jedit.objectives.objective import Value


@dataclasses.dataclass(frozen=True)
class EWC:
    """Half the quadratic form of how far the parameters are from an anchor, in its curvature.

    An objective whose reference is the anchor: `learn_on` hands it over, and so does
    `unlearn(method, apply, LoopState(0, params, None, anchor), ...)`. Parameters that the curvature
    does not cover are free. It reads no row.
    """

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: PyTree = None,
        retain: PyTree = None,
        reference: PyTree = None,
    ) -> Value:
        """Return the penalty, in nats; costs one rotation of every block, twice with its gradient.

        Raises:
            TypeError: the reference is no anchor, and no tuple of one or more.
        """
        del apply, forget, retain
        anchors = (reference,) if isinstance(reference, Anchor) else reference
        is_tuple = isinstance(anchors, tuple) and len(anchors) > 0
        if not is_tuple or not all(isinstance(a, Anchor) for a in anchors):
            raise TypeError(
                "EWC needs as its reference what `anchored` returns, or a tuple of these; got "
                f"{'nothing' if anchors == () else type(reference).__name__}"
            )
        parts = []
        for anchor in anchors:
            moved = jax.tree.map(lambda p, a: wide(p) - wide(a), params, anchor.params)
            form = quadratic_form(anchor.curvature, moved)
            parts.append(anchor.weight.astype(form.dtype) * form / 2)
        penalty = jnp.sum(jnp.stack(parts))
        return penalty, {"ewc": penalty}
