"""Many requests to forget: a stack of them in one call, or a stream, one after the other."""

from jedit.requests.batch import BatchInfo, Solver, batch_unlearn
from jedit.requests.overlap import balanced, interactions
from jedit.requests.stream import Answering, Refresh, RequestInfo, continual

__all__ = [
    "Answering",
    "BatchInfo",
    "Refresh",
    "RequestInfo",
    "Solver",
    "balanced",
    "batch_unlearn",
    "continual",
    "interactions",
]
