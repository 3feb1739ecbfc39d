"""Rows in the words that a model was tuned on: prompt templates, and which tokens are the answer.

A row is one text, before + answer + end, and is tokenised as one text, which is how the model will
see it.  A token counts as the answer's if it holds any character of the answer or of the end token:
it is predicted from the prompt alone, so a token that a merge has made of the prompt's last
character and the answer's first ones (" Paris" behind "Answer: ") counts, and is no part of what a
generation starts from.  What a template puts behind the end token (a line break, say) is left out.

Differences.  TOFU's code counts the tokens of the question tokenised by itself and leaves out so
many of the row's, which is off by one wherever a merge crosses the boundary; frameworks that find
the answer by searching for the tokens of a header miss it for the same reason.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from jedit.core.batch import Batch
from jedit.core.checks import check_numbers
from jedit.data.text import LENGTH, Spans, as_batch, marked_tokens


class Rendered(NamedTuple):
    """A question-answer row filled into a template, as texts.

    Attributes:
        before: text that the model is given, the special tokens at the start included.
        answer: text that the model is to say.
        end: the token that ends the answer; empty for none.
    """

    before: str
    answer: str
    end: str


Render = Callable[[str, str], Rendered]


def plain_template(before: str, end: str) -> Render:
    """Make a template from its two parts.

    Args:
        before: text in front of the answer, with {question} where the question stands: "Question:
            {question} Answer:".
        end: the end token's text, "</s>".

    Raises:
        ValueError: `before` has no place for the question.
    """
    if before.count("{question}") != 1:
        raise ValueError(f"before must hold {{question}} once, got {before!r}.")

    def render(question: str, answer: str) -> Rendered:
        return Rendered(before.replace("{question}", question), answer, end)

    return render


def chat_template(tokenizer: Any, system: str | None = None) -> Render:
    """Make a template of a tokenizer's own chat template.

    Args:
        tokenizer: a tokenizer of the package transformers, with a chat template.
        system: the system message, or None for what the template puts there by itself.
    """
    specials = [str(token) for token in tokenizer.all_special_tokens]
    first = [] if system is None else [{"role": "system", "content": system}]

    # Qwen 3 writes an empty thought before an answer, and before a generation only when told not
    # to think; templates without the variable pass over it.
    write = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)

    def render(question: str, answer: str) -> Rendered:
        asked = [*first, {"role": "user", "content": question}]
        whole = [*asked, {"role": "assistant", "content": answer}]
        before = write(asked, add_generation_prompt=True)
        text = write(whole)
        if not text.startswith(before):
            raise ValueError(
                "the chat template writes the question in another way once it is answered, so the "
                f"answer's place is not known: {before!r} does not begin {text!r}."
            )
        rest = text[len(before) :]
        if not rest.startswith(answer):
            if not rest.startswith(answer.strip()):
                raise ValueError(f"the chat template changes the answer {answer!r} to {rest!r}.")
            answer = answer.strip()
        rest = rest[len(answer) :]
        found = [(rest.index(token), token) for token in specials if token and token in rest]
        if not found:
            return Rendered(before, answer, rest.rstrip())
        place, token = min(found)
        return Rendered(before, answer, rest[: place + len(token)])

    return render


def encode_rendered(
    tokenizer: Any,
    rows: Sequence[Rendered],
    max_len: int | None = None,
    *,
    pad: int,
    truncate: bool = False,
    spans: Sequence[Spans] | None = None,
) -> Batch:
    """Encode rendered rows as `encode_rows` does; no special tokens are added to their texts.

    Args:
        tokenizer: a tokenizer of the package tokenizers, or a fast one of transformers.
        rows: the rendered rows, at least one.
        max_len: number of tokens a row may have; None: the longest row's.
        pad: the token to fill up with; it has no effect on anything.
        truncate: whether longer rows are cut off at the right, instead of being refused.
        spans: by row the characters of its answer that count, as in `encode_rows`.

    Returns:
        One batch of the rows, in their order.

    Raises:
        ValueError: there are no rows, one is longer than `max_len`, or one has no token to
            predict.
    """
    check_numbers(LENGTH, max_len=max_len)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    found, names, marks = [], [], []
    for i, row in enumerate(rows):
        name = f"row {i} ({row.before!r})"
        encoded = backend.encode("".join(row), add_special_tokens=False)
        start = next(
            (k for k, (_, stop) in enumerate(encoded.offsets) if stop > len(row.before)), None
        )
        if not (row.before or row.end) and len(encoded.ids) > 1:
            start = 1  # of a text by itself the first token is given
        if not start:  # nothing to predict, or nothing to predict it from
            raise ValueError(f"{name}: the answer has no token that follows another one.")
        found.append((start, encoded.ids))
        names.append(name)
        mine = () if spans is None else spans[i]
        marks.append(marked_tokens(encoded.offsets, mine, len(row.before)))
    return as_batch(found, pad, max_len, truncate=truncate, names=names, marks=marks)
