"""Question-answer rows as token arrays.

A row is the tokens of its question, then those of " " and its answer, then the end token. The two
parts are encoded apart and joined, so that no merge of the tokenizer crosses from the question into
the answer, and the same question has the same tokens whatever answer follows it.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jedit.core.batch import Batch
from jedit.core.checks import Range, check_numbers
from jedit.data.jsonl import QaRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer
else:
    Tokenizer = Any  # the library proper works without the package

PAD, END = "<pad>", "<eos>"
VOCABULARY = Range(256 + 2, is_whole=True)  # the bytes, and the two special tokens
LENGTH = Range(2, is_whole=True)  # an input and a target


class Prompts(NamedTuple):
    """Tokens of questions that a model is to continue, right padded.

    Attributes:
        tokens: the questions' tokens; what follows a question is 0.
        lengths: how many tokens of each row are the question.
    """

    tokens: Int32[np.ndarray, "n seq"]
    lengths: Int32[np.ndarray, " n"]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level byte-pair tokenizer: every text can be encoded and decoded without loss.

    Args:
        texts: texts to train on, `text_of(rows)` for example.
        vocab_size: how many tokens there may be; at least the 256 bytes and two special tokens.

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


def text_of(rows: Iterable[QaRow]) -> list[str]:
    """Return each row as the one text that a model sees, without the end token."""
    return [f"{row.question} {row.answer}" for row in rows]


Spans = Sequence[tuple[int, int]]  # ranges of a text's characters


def encode_rows(
    tokenizer: Tokenizer,
    rows: Sequence[QaRow | tuple[str, str]],
    max_len: int | None = None,
    *,
    truncate: bool = False,
    spans: Sequence[Spans] | None = None,
) -> Batch:
    """Encode questions with their answers, right padded, `max_len - 1` positions wide.

    In the batch, `inputs` (n, seq) are the tokens that the model reads, each row without its last
    one, and `targets` those that follow them. `mask` is 1 where a target belongs to the answer, its
    end token included, and `valid` is 1 where input and target are tokens of the row.

    Args:
        tokenizer: a tokenizer with the special tokens of `train_tokenizer`.
        rows: the rows, at least one; or pairs of a question and any answer to it, a paraphrased or
            a wrong one for a truth ratio.
        max_len: number of tokens a row may have, the end token included; None: the longest row's.
        truncate: whether longer rows are cut off at the right, instead of being refused. A row so
            cut has no end token, and one whose question fills it has no answer: its mask is zero.
        spans: by row the characters of its answer that count, such as `QaRow.forget_span`: `mask`
            is 1 where a token holds one of them. A row of none, or None, counts whole.

    Returns:
        One batch of the rows, in their order.

    Raises:
        ValueError: there are no rows, or a row is longer than `max_len` (the message names it and
            its length).
    """
    check_numbers(LENGTH, max_len=max_len)
    end = _special(tokenizer, END)
    pairs = [(row[0], row[1]) for row in rows]  # of a QaRow these are the question and the answer
    questions = [encoded.ids for encoded in tokenizer.encode_batch([q for q, _ in pairs])]
    answers = tokenizer.encode_batch([f" {a}" for _, a in pairs])
    found = [(len(q), [*q, *a.ids, end]) for q, a in zip(questions, answers, strict=True)]
    marks = None
    if spans is not None:
        # One character further, behind the space.
        parts = zip(questions, answers, spans, strict=True)
        marks = [marked_tokens(a.offsets, mine, 1, len(q)) for q, a, mine in parts]
    names = [
        row.where if isinstance(row, QaRow) else f"row {i} ({row[0]!r})"
        for i, row in enumerate(rows)
    ]
    pad = _special(tokenizer, PAD)
    return as_batch(found, pad, max_len, truncate=truncate, names=names, marks=marks)


def marked_tokens(
    offsets: Sequence[tuple[int, int]], spans: Spans, shift: int, before: int = 0
) -> list[int] | None:
    """Return the tokens that hold a character of one of the spans, or None where there is none.

    Args:
        offsets: by token its first character and the one behind it.
        spans: ranges of characters.
        shift: number of characters that stand before what the spans count from.
        before: number of tokens that stand before these.
    """
    if not spans:
        return None
    return [
        before + i
        for i, (begin, end) in enumerate(offsets)
        if any(begin < high + shift and low + shift < end for low, high in spans)
    ]


def as_batch(
    rows: Sequence[tuple[int, Sequence[int]]],
    pad: int,
    max_len: int | None,
    *,
    truncate: bool,
    names: Sequence[str],
    marks: Sequence[Sequence[int] | None] | None = None,
) -> Batch:
    """Lay rows of tokens out as the batch that `encode_rows` describes.

    Args:
        rows: pairs of the number of tokens before the answer and all tokens of the row.
        pad: the token to fill up with.
        max_len: number of tokens a row may have; None: the longest row's.
        truncate: whether longer rows are cut off, instead of being refused.
        names: names of the rows for messages.
        marks: by row the tokens that count, by their numbers in it; None: the answer's.

    Raises:
        ValueError: there are no rows, or one is longer than `max_len`.
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
        if marks is not None and (mine := marks[i]) is not None:
            mask[i, [k - 1 for k in mine if 0 < k <= stop]] = 1
        else:
            mask[i, max(start - 1, 0) : stop] = 1
        valid[i, :stop] = 1
    return Batch(*map(jnp.asarray, (inputs, targets, mask, valid)))


def prompts_of(encoded: Batch) -> Prompts:
    """Return what to let a model continue: each encoded row up to its first token that counts."""
    inputs, mask, valid = (np.asarray(x) for x in (encoded.inputs, encoded.mask, encoded.valid))
    # Input t is followed by target t, so the inputs up to the first that counts are the prompt; and
    # of a row that was cut off before its answer, all that is left of it.
    first = np.where(mask.any(axis=1), np.argmax(mask > 0, axis=1), valid.sum(axis=1) - 1)
    lengths = (first + 1).astype(np.int32)
    width = int(lengths.max())
    is_prompt = np.arange(width)[None] < lengths[:, None]
    return Prompts(np.where(is_prompt, inputs[:, :width], 0).astype(np.int32), lengths)


def decode_answers(tokenizer: Tokenizer, tokens: Int32[np.ndarray, "n seq"]) -> list[str]:
    """Return the texts of generated tokens up to their first end tokens, without outer spaces."""
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
