"""Several rows of tokens in one sequence, so that less of what is computed is padding.

Rows are laid down longest first, each in the first sequence that has room (first-fit decreasing:
at most 11/9 of the least number of sequences, and one more). Inside a sequence a row keeps its
positions, counted from 0, and its tokens see no other row: the logits of its tokens are those of
the padded row, up to the order of additions.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jedit.core.batch import Batch, PackedTokens
from jedit.core.checks import COUNT, check_numbers


class Packing(NamedTuple):
    """Rows laid several to a sequence, and the way back to the rows.

    Attributes:
        batch: the sequences; its inputs are `PackedTokens`. Padding is 0 everywhere.
        index: places (n, width), by row and position, of the row's tokens among all those of the
            batch, sequence after sequence; -1 on padding.
    """

    batch: Batch
    index: Int[Array, "n width"]

    def unpack(self, values: Array) -> Array:
        """Take values of the sequences' tokens back to the rows.

        Args:
            values: (sequences, length, ...), logits or token losses for example.

        Returns:
            (n, width, ...), by row and position; 0 on padding.

        Raises:
            ValueError: the values are not of this packing's sequences.
        """
        shape = self.batch.inputs.tokens.shape
        if values.shape[:2] != shape:
            raise ValueError(f"expected values of shape {(*shape, '...')}, got {values.shape}.")
        flat = jnp.asarray(values).reshape(-1, *values.shape[2:])
        is_token = (self.index >= 0).reshape(*self.index.shape, *(1,) * (flat.ndim - 1))
        # Index -1 reads the last token, which the mask then replaces.
        return jnp.where(is_token, flat[self.index], jnp.zeros((), flat.dtype))


def pack(rows: Batch, length: int) -> Packing:
    """Put right padded rows of tokens several to a sequence.

    The batch is used like the rows: `batches(packing.batch, 8)` cuts it, losses and metrics that
    are sums over tokens give what they give of the rows, and so does K-FAC, whose factors are such
    sums. `answer_nll_per_row(apply, params, batches(packing.batch, 8))` gives one loss per row, in
    the order of `rows`, and thereby `answer_probability` and `truth_ratio`; `exact_memorization`
    likewise. What looks at whole examples in other ways (NPO, DPO, SimNPO, Min-K%, extraction
    strength, gradient norms) refuses packed batches. K-FAC's diagonal blocks with
    `fisher="empirical"`, its `sharing="reduce"` and EK-FAC square a sum over an *example*, and to
    them a sequence is one: with the model's own labels the expectation is the same, with given
    labels the numbers are others.

    Runs on the host; the longest sequences come first, so shuffle before training. The work of
    attention grows with the length: a few times the longest row is enough.

    Args:
        rows: inputs (n, width) of tokens; targets, mask and valid, where given, lead with that
            shape. A row without a valid token is put nowhere.
        length: how many tokens a sequence has room for.

    Returns:
        The sequences, as few as first-fit decreasing finds, and the way back.

    Raises:
        ValueError: the inputs are no (n, width) integers, or another array does not fit them;
            `valid` is not ones and then zeros; a row is longer than `length`; no row has a token.
    """
    check_numbers(COUNT, length=length)
    tokens = _tokens_of(rows)
    sizes = _sizes_of(rows, tokens.shape)
    if sizes.max(initial=0) > length:
        raise ValueError(
            f"row {np.argmax(sizes)} is {sizes.max()} tokens long, more than length = {length} (as "
            f"are {np.sum(sizes > length)} of {len(sizes)} rows): give a larger length, or cut the "
            "rows off."
        )
    if not sizes.any():
        raise ValueError("there is nothing to pack: no row has a valid token.")
    starts = _first_fit_decreasing(sizes, length)
    places = np.arange(tokens.shape[1], dtype=np.int32)[None]
    is_token = places < sizes[:, None]
    index = np.where(is_token, starts[:, None] + places, -1).astype(np.int32)
    num_sequences = int(index.max()) // length + 1

    def packed(array: np.ndarray) -> Array:
        out = np.zeros((num_sequences * length, *array.shape[2:]), array.dtype)
        out[index[is_token]] = array[is_token]
        return jnp.asarray(out.reshape(num_sequences, length, *array.shape[2:]))

    # From 1, so that the zeros of padding are a segment of their own that no row attends to.
    segments = np.broadcast_to(np.arange(1, len(tokens) + 1, dtype=np.int32)[:, None], tokens.shape)
    positions = np.broadcast_to(places, tokens.shape)
    inputs = PackedTokens(packed(tokens), packed(segments), packed(positions))
    given = (rows.targets, rows.mask, np.ones(tokens.shape, np.float32))
    others = (None if array is None else packed(np.asarray(array)) for array in given)
    return Packing(Batch(inputs, *others), jnp.asarray(index))


def _tokens_of(rows: Batch) -> np.ndarray:
    if isinstance(rows.inputs, PackedTokens):
        raise ValueError("these rows are packed already.")
    tokens = np.asarray(rows.inputs)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"the inputs must be tokens, integers of shape (n, width); got {tokens.dtype} of shape "
            f"{tokens.shape}."
        )
    for name in ("targets", "mask", "valid"):
        array = getattr(rows, name)
        if array is not None and array.shape[:2] != tokens.shape:
            raise ValueError(
                f"{name} has shape {array.shape}, but the tokens have {tokens.shape}: there must "
                "be one entry per token."
            )
    return tokens


def _sizes_of(rows: Batch, shape: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    is_valid = np.ones(shape, bool) if rows.valid is None else np.asarray(rows.valid).astype(bool)
    is_gap = np.any(is_valid[:, 1:] & ~is_valid[:, :-1], axis=1)
    if is_gap.any():
        raise ValueError(
            f"row {np.argmax(is_gap)} has a valid token behind padding: the rows must be right "
            "padded."
        )
    return is_valid.sum(axis=1)


def _first_fit_decreasing(sizes: Int[np.ndarray, " n"], length: int) -> Int[np.ndarray, " n"]:
    """Return where each row starts, among the places of all sequences in a line."""
    space = np.full(len(sizes), length)
    starts = np.zeros(len(sizes), np.int64)
    num_used = 0
    for row in np.argsort(-sizes, kind="stable"):
        # One sequence more than is used: an empty one always fits, so argmax finds a True.
        sequence = int(np.argmax(space[: num_used + 1] >= sizes[row]))
        starts[row] = sequence * length + length - space[sequence]
        space[sequence] -= sizes[row]
        num_used = max(num_used, sequence + 1)
    return starts
