"""Alternate answers: what a model itself says to the questions that it is to forget, if wrong.

AltPO prompts an instruction-tuned model with the question, the answer and a wish for other facts;
the small models of the comparisons follow no instruction, so they are asked the question alone.
Wrong answers that come with the rows are not taken: the evaluation measures by them.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jedit.data import Prompts, QaRow
from jedit.models import Stepper, cached_decode, sampled_decode

# AltPO samples at 1, where a model that has memorised a row gives its answer; what is above is
# arbitrary.
TEMPERATURES = (1.0, 1.5, 2.0, 3.0)
FIELD = "alternate_answer"  # of a row that brings its own
Ask = Callable[[Array, float], Sequence[str]]


def sampled_alternates(rows: Sequence[QaRow], ask: Ask, *, key: Array) -> list[tuple[str, str]]:
    """Return each question with one alternate answer.

    Args:
        rows: the questions with their right answers; one with a text in the field
            "alternate_answer" brings its own.
        ask: of a key and a temperature, an answer to each question.
        key: of all draws.

    Returns:
        Pairs of texts. The answer is the first that is neither empty nor the right one, out of one
        draw at each of `TEMPERATURES`; the right one where all are, which AltPO then does not move.
    """
    given = ((i, row.fields.get(FIELD)) for i, row in enumerate(rows))
    found = {i: text for i, text in given if isinstance(text, str) and text}
    for i, temperature in enumerate(TEMPERATURES):
        if len(found) == len(rows):
            break
        texts = ask(jax.random.fold_in(key, i), temperature)
        for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if number not in found and text and text != row.answer.strip():
                found[number] = text
    return [(row.question, found.get(i, row.answer)) for i, row in enumerate(rows)]


def sampled_tokens(
    stepper: Stepper,
    params: PyTree,
    prompts: Prompts,
    num_steps: int,
    *,
    chunk: int,
    key: Array,
    temperature: float,
) -> np.ndarray:
    """Return the tokens drawn after each prompt, `chunk` rows at a time: the cache takes room."""

    def drawn(start: int, rows: Prompts) -> Array:
        return sampled_decode(
            stepper,
            params,
            rows.tokens,
            num_steps,
            key=jax.random.fold_in(key, start),
            temperature=temperature,
            prompt_lengths=rows.lengths,
        )

    return _in_chunks(drawn, prompts, chunk)


def likeliest_tokens(
    stepper: Stepper, params: PyTree, prompts: Prompts, num_steps: int, *, chunk: int
) -> np.ndarray:
    """Return the likeliest tokens after each prompt, `chunk` rows at a time."""

    def likeliest(_: int, rows: Prompts) -> Array:
        given = (stepper, params, rows.tokens, num_steps)
        return cached_decode(*given, prompt_lengths=rows.lengths)

    return _in_chunks(likeliest, prompts, chunk)


def _in_chunks(decode: Callable[[int, Prompts], Array], prompts: Prompts, chunk: int) -> np.ndarray:
    number = len(prompts.tokens)
    tokens = []
    for start in range(0, number, chunk):
        places = np.arange(start, start + chunk) % number  # one shape for all
        rows = Prompts(prompts.tokens[places], prompts.lengths[places])
        tokens.append(np.asarray(decode(start, rows)))
    return np.concatenate(tokens)[:number]
