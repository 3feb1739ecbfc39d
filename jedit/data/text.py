"""Question-answer rows as token arrays.

A row is the tokens of its question, then those of " " and its answer, then the end token. The two
parts are encoded apart and joined, so that no merge of the tokenizer crosses from the question into
the answer, and the same question has the same tokens whatever answer follows it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from jedit.core.batch import Batch
from jedit.core.checks import COUNT, Range, check_numbers
from jedit.data.invented.authors import Fact
from jedit.data.jsonl import QaRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer
else:
    Tokenizer = Any  # the library proper works without the package

PAD, END = "<pad>", "<eos>"
VOCABULARY = Range(256 + 2, is_whole=True)  # the bytes, and the two special tokens
LENGTH = Range(2, is_whole=True)  # an input and a target

Row = QaRow | Fact


class Encoded(NamedTuple):
    """Rows as arrays of one width, right padded with the padding token.

    Attributes:
        inputs: the tokens that the model reads: each row without its last token.
        targets: the tokens that follow them: each row without its first token.
        mask: 1 where the target belongs to the answer, its end token included; else 0.
        valid: 1 where input and target are tokens of the row; 0 on padding.
    """

    inputs: Int32[np.ndarray, "n seq"]
    targets: Int32[np.ndarray, "n seq"]
    mask: Float32[np.ndarray, "n seq"]
    valid: Float32[np.ndarray, "n seq"]

    def as_batch(self) -> Batch:
        """The same arrays on the device."""
        return Batch(*(jnp.asarray(array) for array in self))


class Prompts(NamedTuple):
    """Questions to be continued, right padded.

    Attributes:
        tokens: of the questions.
        lengths: how many tokens of each row are the question.
    """

    tokens: Int32[np.ndarray, "n seq"]
    lengths: Int32[np.ndarray, " n"]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level byte-pair tokenizer: every text can be encoded and decoded without loss.

    Args:
        texts: what to train on, `text_of(rows)` for example.
        vocab_size: at most so many tokens; at least the 256 bytes and two special tokens.

    Returns:
        A tokenizer with "<pad>" as token 0 and "<eos>" as token 1.

    Raises:
        ValueError: the vocabulary has no room for the bytes.
    """
    check_numbers(VOCABULARY, vocab_size=vocab_size)
    tokenizers = _tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write the tokenizer as JSON."""
    tokenizer.save(str(path))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer that `save_tokenizer` wrote."""
    return _tokenizers().Tokenizer.from_file(str(path))


def text_of(rows: Iterable[Row]) -> list[str]:
    """Each row as the one text the model sees, without the end token."""
    return [f"{row.question} {row.answer}" for row in rows]


def encode_rows(
    tokenizer: Tokenizer, rows: Sequence[Row], max_len: int | None = None, *, truncate: bool = False
) -> Encoded:
    """Encode questions with their answers, `max_len - 1` positions wide.

    Args:
        tokenizer: with the special tokens of `train_tokenizer`.
        rows: at least one.
        max_len: tokens a row may have, the end token included; None: the longest row's.
        truncate: cut longer rows off at the right, instead of refusing them. A row so cut has no
            end token, and one whose question fills it has no answer: its mask is zero.

    Returns:
        The rows, in order.

    Raises:
        ValueError: no rows, or a row longer than `max_len` (the message names it and its length).
    """
    return encode_pairs(
        tokenizer,
        [(row.question, row.answer) for row in rows],
        max_len,
        truncate=truncate,
        names=[getattr(row, "where", "") for row in rows],
    )


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    max_len: int | None = None,
    *,
    truncate: bool = False,
    names: Sequence[str] | None = None,
) -> Encoded:
    """Encode questions with any answers to them: paraphrased or wrong ones, for a truth ratio.

    Args:
        tokenizer: with the special tokens of `train_tokenizer`.
        pairs: (question, answer), at least one.
        max_len: as in `encode_rows`.
        truncate: as in `encode_rows`.
        names: what to call each pair in a message; None: its number and question.

    Returns:
        The pairs, in order.

    Raises:
        ValueError: no pairs, or one longer than `max_len`.
    """
    check_numbers(LENGTH, max_len=max_len)
    end = _special(tokenizer, END)
    questions = [encoded.ids for encoded in tokenizer.encode_batch([q for q, _ in pairs])]
    answers = [encoded.ids for encoded in tokenizer.encode_batch([f" {a}" for _, a in pairs])]
    rows = [(len(q), [*q, *a, end]) for q, a in zip(questions, answers, strict=True)]
    given = [
        (names[i] if names else "") or f"row {i} ({question!r})"
        for i, (question, _) in enumerate(pairs)
    ]
    return as_encoded(rows, _special(tokenizer, PAD), max_len, truncate=truncate, names=given)


def as_encoded(
    rows: Sequence[tuple[int, Sequence[int]]],
    pad: int,
    max_len: int | None,
    *,
    truncate: bool,
    names: Sequence[str],
) -> Encoded:
    """Lay rows of tokens out as arrays.

    Args:
        rows: for each the number of its tokens before the answer, and all its tokens.
        pad: the token to fill up with.
        max_len: as in `encode_rows`.
        truncate: as in `encode_rows`.
        names: what to call each row in a message.

    Returns:
        The rows, in order.

    Raises:
        ValueError: no rows, or one longer than `max_len`.
    """
    if not rows:
        raise ValueError("there are no rows to encode.")
    lengths = [len(tokens) for _, tokens in rows]
    if max_len is None:
        max_len = max(lengths)
    if max_len < 2:
        raise ValueError(f"max_len must be at least 2, an input and a target, got {max_len}.")
    if not truncate and max(lengths) > max_len:
        i = next(i for i, length in enumerate(lengths) if length > max_len)
        raise ValueError(
            f"{names[i]}: the row is {lengths[i]} tokens long, more than max_len = {max_len} (as "
            f"are {sum(length > max_len for length in lengths)} of {len(rows)} rows; the longest "
            f"has {max(lengths)}). Give a larger max_len, or truncate=True to cut rows off."
        )
    shape = (len(rows), max_len - 1)
    inputs = np.full(shape, pad, np.int32)
    targets = inputs.copy()
    mask, valid = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for i, (start, tokens) in enumerate(rows):
        stop = min(len(tokens), max_len) - 1
        inputs[i, :stop] = tokens[:stop]
        targets[i, :stop] = tokens[1 : stop + 1]
        # Target t is token t + 1, and the answer's first token stands behind the question's last.
        mask[i, max(start - 1, 0) : stop] = 1
        valid[i, :stop] = 1
    return Encoded(inputs, targets, mask, valid)


def encode_prompts(
    tokenizer: Tokenizer, questions: Sequence[str], max_len: int | None = None
) -> Prompts:
    """Encode questions alone, to let a model continue them.

    Args:
        tokenizer: with the special tokens of `train_tokenizer`.
        questions: at least one.
        max_len: width of the array; None: the longest question's.

    Returns:
        The questions, in order.

    Raises:
        ValueError: no questions, or one longer than `max_len`.
    """
    check_numbers(COUNT, max_len=max_len)
    if not questions:
        raise ValueError("there are no questions to encode.")
    rows = [encoded.ids for encoded in tokenizer.encode_batch(list(questions))]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    width = int(lengths.max()) if max_len is None else max_len
    if lengths.max() > width:
        i = int(np.argmax(lengths > width))
        raise ValueError(
            f"{questions[i]!r} is {lengths[i]} tokens long, more than max_len = {width}."
        )
    tokens = np.full((len(rows), width), _special(tokenizer, PAD), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return Prompts(tokens, lengths)


def decode_answers(tokenizer: Tokenizer, tokens: Int32[np.ndarray, "n seq"]) -> list[str]:
    """The texts of generated tokens, each up to its first end token, without outer spaces."""
    end = _special(tokenizer, END)
    texts = []
    for row in np.asarray(tokens).tolist():
        answer = row[: row.index(end)] if end in row else row
        texts.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    return texts


def _special(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no token {token}; train it with train_tokenizer.")
    return number


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "jedit.data.text needs the package tokenizers: pip install 'jedit[demo]'."
        ) from None
    return tokenizers
