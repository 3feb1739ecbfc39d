"""Requests to forget: one, many in one call, or a stream, one after the other."""

from jedit.requests.batch import BatchInfo, Solver, batch_unlearn
from jedit.requests.comeback import Comeback
from jedit.requests.forget import ForgetInfo, forget
from jedit.requests.forgetting import Forgetting, Natural, Recovery, Rewind, Watching
from jedit.requests.overlap import balanced, interactions
from jedit.requests.refitted import Refit, unlearn_refitted
from jedit.requests.stream import Answering, Refresh, RequestInfo, continual
from jedit.requests.unseen import Unseen

__all__ = [
    "Answering",
    "BatchInfo",
    "Comeback",
    "ForgetInfo",
    "Forgetting",
    "Natural",
    "Recovery",
    "Refit",
    "Refresh",
    "RequestInfo",
    "Rewind",
    "Solver",
    "Unseen",
    "Watching",
    "balanced",
    "batch_unlearn",
    "continual",
    "forget",
    "interactions",
    "unlearn_refitted",
]
