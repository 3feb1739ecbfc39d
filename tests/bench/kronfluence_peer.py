"""A contender in torch: kronfluence on the same two models. Imports nothing of jedit.

    PYTHON tests/bench/kronfluence_peer.py JSON      prints one line of JSON

PYTHON is an interpreter with torch and kronfluence, which need not be jedit's own (see
`tests.bench`), and JSON what `request` in `tests.bench.child` makes of a case. Kronfluence's own
loops over a list of batches are timed, so that neither data loaders nor files are.
"""

import json
import math
import sys

import torch
from kronfluence import prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
from kronfluence.task import Task
from kronfluence.utils.state import State
from torch.nn import functional as F  # noqa: N812
from torch_models import make, measure, tracked


class _Sampled(Task):
    """Cross-entropy summed over outputs, at labels sampled from the model."""

    def __init__(self, tracked):
        self.tracked = tracked

    def get_influence_tracked_modules(self):
        return self.tracked

    def compute_train_loss(self, batch, model, sample=False):
        del sample
        logits = model(batch)
        logits = logits.reshape(-1, logits.shape[-1])
        with torch.no_grad():
            labels = torch.multinomial(torch.softmax(logits, dim=-1), 1)[:, 0]
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def run(request: dict) -> dict:
    """Measure one job."""
    model, batches = make(request)
    task = _Sampled(tracked(model))
    model = prepare_model(model, task)
    arguments = FactorArguments(use_empirical_fisher=False)
    state = State()
    options = {
        "model": model,
        "state": state,
        "task": task,
        "factor_args": arguments,
        "disable_tqdm": True,
    }

    def factors(loader):
        return fit_covariance_matrices_with_loader(loader=loader, **options)[1]

    if request["job"] == "factors":
        return measure(factors, batches, request)
    rows = request["batch"] * request["positions"]
    enough = math.ceil(4 * max(max(m) for m in request["matrices"]) / rows)
    covariances = factors(batches[:enough])
    eigen = perform_eigendecomposition(covariances, model, state, arguments, disable_tqdm=True)

    def eigenvalues(loader):
        return fit_lambda_matrices_with_loader(loader=loader, eigen_factors=eigen, **options)[1]

    return measure(eigenvalues, batches, request)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
