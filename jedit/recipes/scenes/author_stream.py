"""A stream of invented authors: a small GPT learns them part after part, and is asked for all.

A row is remembered if each token of its keyword (the birthplace, the book) is the likeliest one
under the answer's beginning; wording does not count.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, check_numbers
from jedit.data import (
    QaRow,
    decode_answers,
    encode_rows,
    generate_authors,
    prompts_of,
    text_of,
    train_tokenizer,
)
from jedit.metrics._greedy import greedy_hits
from jedit.models import gpt_stepper
from jedit.objectives import Played, Views, stack_views
from jedit.recipes.alternates import sampled_tokens
from jedit.recipes.dialogue import continued
from jedit.recipes.scenes.authors import MODEL
from jedit.recipes.scenes.question_answer import ANSWER_TOKENS, Model
from jedit.recipes.tokenization import OwnWords


class AuthorStream(NamedTuple):
    """Parts of invented authors, and a GPT that has learnt none of them.

    Attributes:
        apply: the model.
        params: initial parameters.
        parts: the rows of each part.
        tasks: the same, encoded.
        tests: the same, of which the keywords' tokens alone count.
        tokenizer: of the words of all parts.
        model: the size of the GPT.
    """

    apply: Apply
    params: PyTree
    parts: tuple[list[QaRow], ...]
    tasks: tuple[Batch, ...]
    tests: tuple[Batch, ...]
    tokenizer: Any
    model: Model


def author_stream(
    *,
    seed: int,
    num_parts: int = 4,
    authors_per_part: int = 8,
    facts_per_author: int = 8,
    model: Model = MODEL,
) -> AuthorStream:
    """Invent the authors, part them, and make the model.

    Args:
        seed: seed of the authors and of the initial parameters.
        num_parts: how many parts; 4 is arbitrary.
        authors_per_part: authors of a part; 8 is arbitrary.
        facts_per_author: rows of an author; 8 is arbitrary.
        model: size of the GPT.
    """
    check_numbers(COUNT, num_parts=num_parts, authors_per_part=authors_per_part)
    rows = generate_authors(seed, num_parts * authors_per_part, facts_per_author)
    count = authors_per_part * facts_per_author
    parts = tuple(rows[i : i + count] for i in range(0, len(rows), count))
    tokenizer = train_tokenizer(text_of(rows), model.vocab)
    # As wide as the longest row in any words, so that all parts and views have one shape.
    every = [pair for part in parts for view in _views(part) for pair in view]
    width = encode_rows(tokenizer, every).inputs.shape[1]
    encode = functools.partial(encode_rows, tokenizer, max_len=width + 1)
    key = jax.random.key(seed)
    apply, params = model.make(tokenizer.get_vocab_size(), width + ANSWER_TOKENS, key=key)
    tests = tuple(encode(part, spans=[_keyword(row) for row in part]) for part in parts)
    return AuthorStream(apply, params, parts, tuple(map(encode, parts)), tests, tokenizer, model)


def remembered(apply: Apply, tests: Sequence[Batch]) -> Callable[[PyTree], Float[Array, " parts"]]:
    """Return the function of params that gives the share of each part's rows that is remembered."""
    fixed = tuple(tests)

    @jax.jit
    def of(params: PyTree, tests: tuple[Batch, ...]) -> Array:
        found = []
        for test in tests:
            hits, counted = greedy_hits(params, test, apply=apply)
            found.append(jnp.mean(jnp.all(hits | ~counted, axis=1).astype(jnp.float32)))
        return jnp.stack(found)

    return lambda params: of(params, fixed)


def in_views(stream: AuthorStream, part: int) -> Views:
    """Return a part's rows in four views: question and answer each as it is or in other words."""
    width = stream.tasks[part].inputs.shape[1]
    views = _views(stream.parts[part])
    return stack_views([encode_rows(stream.tokenizer, view, width + 1) for view in views])


def asks(
    stream: AuthorStream, part: int, *, questions: int = 8, group: int = 8
) -> Callable[..., Played]:
    """Return what asks a part's questions, as `methods.rft` takes it.

    An answer that holds the row's keyword earns 1, any other 0.

    Args:
        stream: the stream.
        part: which of its parts.
        questions: how many are drawn at a time; 8 is arbitrary.
        group: answers to each; 8, RULE's.
    """
    check_numbers(COUNT, questions=questions, group=group)
    rows = stream.parts[part]
    words = OwnWords(stream.tokenizer)
    prompts = prompts_of(stream.tasks[part])
    stepper = gpt_stepper(num_layers=stream.model.layers, num_heads=stream.model.heads)

    def play(params: PyTree, *, key: Array) -> Played:
        pick, draw = jax.random.split(key)
        chosen = np.asarray(jax.random.permutation(pick, len(rows)))[:questions]
        asked = np.repeat(chosen, group)
        given = prompts._replace(tokens=prompts.tokens[asked], lengths=prompts.lengths[asked])
        steps = ANSWER_TOKENS
        drawn = sampled_tokens(
            stepper, params, given, steps, chunk=len(asked), key=draw, temperature=1.0
        )
        texts = decode_answers(stream.tokenizer, drawn)
        rewards = [
            float(str(rows[i].fields["value"]).lower() in text.lower())
            for i, text in zip(asked, texts, strict=True)
        ]
        batch = continued(given, drawn, ends=words.ends)
        return Played(batch, np.asarray(rewards).reshape(-1, group))

    return play


def _views(rows: Sequence[QaRow]) -> list[list[tuple[str, str]]]:
    """Return the rows themselves, and in three other wordings."""
    return [
        [
            (
                (row.paraphrased_question or row.question) if other_question else row.question,
                (row.paraphrased_answer or row.answer) if other_answer else row.answer,
            )
            for row in rows
        ]
        for other_question, other_answer in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]


def _keyword(row: QaRow) -> tuple[tuple[int, int], ...]:
    """Return where the keyword stands in the answer; nothing if it does not: then all counts."""
    value = str(row.fields["value"])
    start = row.answer.lower().find(value.lower())
    return () if start < 0 else ((start, start + len(value)),)
