"""Rows as tokens and tokens as answers: by a tokenizer of our own, or by a model's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jedit.core.batch import Batch
from jedit.data import (
    Prompts,
    chat_template,
    decode_answers,
    encode_rendered,
    encode_rows,
    plain_template,
    prompts_of,
)
from jedit.data.templates import Render, Rendered
from jedit.data.text import END, Spans
from jedit.models._optional import optional

Pairs = Sequence[tuple[str, str]]


class OwnWords(NamedTuple):
    """Rows as tokens, the answer behind the question, by a tokenizer of `train_tokenizer`."""

    tokenizer: Any

    def rows(
        self, pairs: Pairs, max_len: int | None = None, spans: Sequence[Spans] | None = None
    ) -> Batch:
        """Encode questions with answers; without a `max_len` as wide as the longest row.

        Longer rows than `max_len` are cut off at the right. `spans` are those of `encode_rows`.
        """
        is_cut = max_len is not None
        return encode_rows(self.tokenizer, pairs, max_len, truncate=is_cut, spans=spans)

    def prompts(self, pairs: Pairs) -> Prompts:
        """Encode what stands before the answers, to be continued."""
        return prompts_of(self.rows(pairs))

    def prompt_texts(self, prompts: Prompts) -> list[str]:
        """Decode the texts of prompts."""
        return [self.tokenizer.decode(ids) for ids in _token_ids(prompts)]

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset({self.tokenizer.token_to_id(END)})

    def answers(self, tokens: Int32[np.ndarray, "n seq"]) -> list[str]:
        """Decode the texts of generated tokens, each up to its end."""
        return decode_answers(self.tokenizer, tokens)


class ModelWords(NamedTuple):
    """Rows as tokens of a template that is filled in, by a fast tokenizer of transformers.

    Its methods do what those of `OwnWords` do.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        render: a function that puts a question and its answer into the template.
        ends: the tokens that end an answer.
    """

    tokenizer: Any
    render: Render
    ends: frozenset[int]

    def rows(
        self, pairs: Pairs, max_len: int | None = None, spans: Sequence[Spans] | None = None
    ) -> Batch:
        """Encode questions with answers in the template."""
        rendered = [self.render(question, answer) for question, answer in pairs]
        if spans is not None:
            # Some templates take the spaces around an answer away.
            gone = [a.find(row.answer) for (_, a), row in zip(pairs, rendered, strict=True)]
            spans = [
                _moved(mine, n, len(row.answer))
                for mine, n, row in zip(spans, gone, rendered, strict=True)
            ]
        given = {"pad": self.tokenizer.pad_token_id or 0, "truncate": max_len is not None}
        return encode_rendered(self.tokenizer, rendered, max_len, spans=spans, **given)

    def prompts(self, pairs: Pairs) -> Prompts:
        """Encode what stands before the answers, which decide only what merges into them."""
        return prompts_of(self.rows(pairs))

    def prompt_texts(self, prompts: Prompts) -> list[str]:
        """Decode the texts of prompts, without the template's special tokens."""
        decode = self.tokenizer.decode
        return [decode(ids, skip_special_tokens=True) for ids in _token_ids(prompts)]

    def answers(self, tokens: Int32[np.ndarray, "n seq"]) -> list[str]:
        """Decode the texts of generated tokens, each up to the first that ends an answer."""
        texts = []
        for row in np.asarray(tokens).tolist():
            stop = next((i for i, token in enumerate(row) if token in self.ends), len(row))
            texts.append(self.tokenizer.decode(row[:stop], skip_special_tokens=True).strip())
        return texts


Words = OwnWords | ModelWords
NOWHERE = (-(10**9), -(10**9))


def _moved(spans: Spans, begin: int, length: int) -> Spans:
    """Return spans of a text as those of its part; of what is not in it one that marks nothing."""
    inside = [(max(low - begin, 0), min(high - begin, length)) for low, high in spans]
    return [(low, high) for low, high in inside if low < high] or [NOWHERE] * bool(spans)


def _token_ids(prompts: Prompts) -> list[list[int]]:
    rows = zip(np.asarray(prompts.tokens).tolist(), prompts.lengths, strict=True)
    return [tokens[:length] for tokens, length in rows]


def load_words(folder: str | Path) -> ModelWords:
    """Read a tokenizer: rows go into its chat template, or into "Question: ... Answer: ...".

    A row without a question is a text: it stands behind the token that begins one, by itself.

    Raises:
        ValueError: the folder has no tokenizer, or one that does not say where in the text a token
            stands.
    """
    try:
        tokenizer = optional("transformers").AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{folder}: no tokenizer could be read there; name the folder of one with --tokenizer. "
            f"({reason})"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: the tokenizer does not say where in a text its tokens stand; one with a "
            "tokenizer.json does."
        )
    if tokenizer.chat_template:
        render = chat_template(tokenizer)
    else:
        start, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
        render = plain_template(f"{start}Question: {{question}}\nAnswer: ", end)
    begin = tokenizer.bos_token or ""

    def with_texts(question: str, answer: str) -> Rendered:
        return render(question, answer) if question else Rendered(begin, answer, "")

    # Chat models end a turn with a token of the template, which need not be the tokenizer's eos.
    last = tokenizer.backend_tokenizer.encode(render("?", ".").end, add_special_tokens=False).ids
    ends = {tokenizer.eos_token_id, *(last if len(last) == 1 else ())} - {None}
    return ModelWords(tokenizer, with_texts, frozenset(ends))
