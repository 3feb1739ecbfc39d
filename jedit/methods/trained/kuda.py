"""KUDA: turn the forget states away inside what the retain inputs hardly use (arXiv 2602.19275).

    1. `causal_trace` says which layers hold the knowledge               -> `select`
    2. L = mean cos(h(x_f), h_ref(x_f)) + α R      `objectives.RepresentationDeviation`
    3. ΔW <- P ΔW,  P = U diag(w) Uᵀ               `geometry.null_space`, `relaxation`

    U, w  eigenbasis of the chosen layers' input moments over the retain set; w is 1 below the
          threshold and decays above                                     `curvature`, `threshold`
    h     hidden state at or after the last of these layers              `objective`

Exact symbols: derived. The three steps are the paper's; the power law of w, the retain term, the
tilt of the objective's target and every default are ours.

Differences. The whole update is projected, and last in the chain, so that the change that is really
made lies in the relaxed null space; the paper projects the forget gradient [paper], which momentum,
weight decay and the retain gradient then leave.
"""

import dataclasses
from collections.abc import Sequence

import optax

from jedit.core.arguments import check_function, check_kind
from jedit.core.paths import matcher
from jedit.curvature import Curvature
from jedit.geometry import null_space
from jedit.objectives import Objective
from jedit.training.method import TrainingMethod
from jedit.transforms import project_realised_update


def kuda(
    curvature: Curvature,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    select: str | Sequence[str],
    threshold: float = 0.02,
    relaxation: float = 1.0,
) -> TrainingMethod:
    """Make KUDA around any optimizer; all parameters but the selected ones stay.

        objective = with_retain(RepresentationDeviation(Entering("blocks/5/mlp/in/kernel")))
        method = kuda(curvature, objective, optax.adam(1e-4), select=r"blocks/(3|4)/mlp/")
        params, history = jedit.unlearn(method, apply, params, forget, retain, steps=100, key=key)

    Args:
        curvature: curvature of the retain rows at the frozen params; only input moments are read.
        objective: `with_retain(RepresentationDeviation(hidden))`, hidden at or after the last of
            the layers; any other may stand in its place.
        optimizer: learning rate included; the projection comes behind it.
        select: regular expression, or several, searched in the parameter paths: the layers to edit.
        threshold: share of the retained inputs' energy that counts as unused; 0.02 is arbitrary.
        relaxation: 0 is the hard projector; 1, w = c/a above the cut, is arbitrary.

    Returns:
        A method for `jedit.unlearn`. A step costs one gradient, one forward pass of the frozen
        model and 4 d_in² d_out flops a matrix.

    Raises:
        ValueError: `select` matches no parameter of the curvature, or what `null_space` refuses.
    """
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    check_function(objective, "objective", "(apply, params, forget, retain, reference)")
    is_selected = matcher(select, "select")
    chosen = {
        name: block for name, block in curvature.blocks.items() if is_selected(block.weight.path)
    }
    if not chosen:
        raise ValueError(
            f"select={select!r} matches no parameter of the curvature; it covers "
            f"{', '.join(list(curvature.blocks)[:12])}"
        )
    projector = null_space(
        dataclasses.replace(curvature, blocks=chosen), threshold=threshold, relaxation=relaxation
    )
    chain = optax.chain(optimizer, project_realised_update(projector))
    return TrainingMethod(objective, chain)
