"""Types that every folder may use; of jedit this module imports how they are shown alone."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PyTree

from jedit.core.display import short_repr

# A model: `apply(params, inputs) -> outputs`.
Apply = Callable[[PyTree, Any], Array]


class Batch(NamedTuple):
    """One batch of examples.

    Attributes:
        inputs: what `apply(params, inputs)` takes; any pytree whose leaves lead with the examples.
        targets: given labels, with the outputs' leading shape (and more, for dense targets).
        mask: outputs that count in the loss (1) or not (0), the outputs' leading shape; None: all.
        valid: positions that are data (1) or padding (0), the outputs' leading shape; None: all.
    """

    inputs: PyTree[Any]
    targets: Array | None = None
    mask: Array | None = None
    valid: Array | None = None

    __repr__ = short_repr


class PackedTokens(NamedTuple):
    """Token sequences of several rows each, as `jedit.data.pack` makes them: inputs of a batch.

    A token sees those of its own row that stand left of it, itself included, and no other row's.

    Attributes:
        tokens: what the model reads.
        segments: which row a token is of: the number of the row, counted from 1; 0: padding.
        positions: where in its row a token stands, counted from 0; 0 on padding.
    """

    tokens: Int[Array, "batch seq"]
    segments: Int[Array, "batch seq"]
    positions: Int[Array, "batch seq"]

    __repr__ = short_repr


class NoisedImages(NamedTuple):
    """Images on their way from noise to what a prompt names: inputs of a diffusion model's batch.

    Attributes:
        images: pixels of each image with noise in it.
        steps: how noisy each is, the index into a schedule, 0 the least.
        prompts: number of the prompt that each is to become; 0 is the empty one.
    """

    images: Float[Array, "batch pixels"]
    steps: Int[Array, " batch"]
    prompts: Int[Array, " batch"]

    __repr__ = short_repr


@runtime_checkable
class Resumable(Protocol):
    """What a long job saves itself with; `jedit.Checkpoint` is one, and explains the methods."""

    every: int

    def resume(
        self, job: str, given: PyTree, state: PyTree
    ) -> tuple[int, PyTree, dict[str, Array]]:
        """Begin, or go on: return the steps that are done, and the state and history after them."""
        ...

    def see(self, data: PyTree) -> None:
        """Take note of a step's data."""
        ...

    def save(self, step: int, state: PyTree, history: Mapping[str, Array] | None = None) -> None:
        """Save the state after a step."""
        ...

    def close(self) -> None:
        """Wait for the last save."""
        ...

    def part(self, name: str, *, every: int | None = None) -> "Resumable":
        """Return what saves one part of the job, beside the others."""
        ...
