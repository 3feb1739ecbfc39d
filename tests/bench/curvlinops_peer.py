"""A contender in torch: curvlinops on the same two models. Imports nothing of jedit.

    PYTHON tests/bench/curvlinops_peer.py JSON      prints one line of JSON

PYTHON and JSON are those of `kronfluence_peer.py`. The model's outputs are flattened to a row for
each position, as its EK-FAC asks for; an example is still a whole sequence. Weight and bias are one
block, as for everybody else. Its hooks want the weights' gradients of every batch, which its loop
over batches computes and drops: that is its usage.
"""

import json
import math
import sys

from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import Tensor, nn
from torch_models import make, measure, tracked


class _Flat(nn.Module):
    """A model with a row of outputs for every position."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.model(x)
        return outputs.reshape(-1, outputs.shape[-1])


def run(request: dict) -> dict:
    """Measure one job."""
    model, batches = make(request)
    flat = _Flat(model)
    for parameter in flat.parameters():
        parameter.requires_grad_(False)
    matrices = [flat.get_submodule(f"model.{name}") for name in tracked(model)]
    chosen = [parameter for matrix in matrices for parameter in matrix.parameters()]
    for parameter in chosen:
        parameter.requires_grad_(True)
    positions = request["positions"]

    def operator(kind, batches):
        # Labels are drawn from the model: those of the data are only counted.
        data = [(x, x.new_zeros(len(x) * positions).long()) for x in batches]
        return kind(
            flat,
            nn.CrossEntropyLoss(reduction="sum"),
            chosen,
            data,
            check_deterministic=False,
            num_per_example_loss_terms=positions,
            num_data=sum(len(x) for x in batches),
            separate_weight_and_bias=False,
        )

    def factors(batches):
        operator(KFACLinearOperator, batches).compute_kronecker_factors()

    if request["job"] == "factors":
        return measure(factors, batches, request)
    rows = request["batch"] * positions
    enough = math.ceil(4 * max(max(m) for m in request["matrices"]) / rows)
    decomposed = operator(EKFACLinearOperator, batches[:enough])
    decomposed._compute_eigenvectors()

    def eigenvalues(batches):
        corrected = operator(EKFACLinearOperator, batches)
        # Its eigenvectors are given, so that the corrected eigenvalues alone are timed.
        for side in ("_input_covariances_eigenvectors", "_gradient_covariances_eigenvectors"):
            setattr(corrected, side, getattr(decomposed, side))
        corrected.compute_eigenvalue_correction()

    return measure(eigenvalues, batches, request)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
