"""Many requests to forget: a stack of them in one call, or a stream, one after the other."""

from jedit.requests.batch import BatchInfo, balanced, batch_unlearn, interactions
from jedit.requests.stream import RequestInfo, continual

__all__ = [
    "BatchInfo",
    "RequestInfo",
    "balanced",
    "batch_unlearn",
    "continual",
    "interactions",
]
