"""Plain texts as rows, and what is asked of a model in its own words: answers, letters, losses."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.data import Choice, Prompts, Rendered, batches
from jedit.data.text import as_batch
from jedit.models import cast_params
from jedit.recipes.alternates import likeliest_tokens
from jedit.recipes.sweep import Measured, compared
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tokenization import ModelWords

ATTACK_WORDS = {"loss": "LOSS", "zlib": "Zlib", "min_k": "Min-K", "min_k_plus_plus": "Min-K++"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def encode_texts(model: LanguageModel, texts: Sequence[str], *, is_cut: bool = False) -> Batch:
    """Encode texts as rows of which every token counts, but the first of each text.

    Args:
        model: the language model's words, and the number of tokens that a row has at most.
        texts: the texts; a longer one makes several rows, each of which begins with the last token
            of the one before, so that every token is predicted once.
        is_cut: whether a longer text is cut off instead, so that each text is one row.

    Raises:
        ValueError: a text of fewer than two tokens, or no text.
    """
    assert isinstance(model.words, ModelWords)
    tokenizer, step = model.words.tokenizer, model.max_len - 1
    rows = []
    for text in texts:
        tokens = tokenizer(text, verbose=False).input_ids  # long texts are cut below
        if len(tokens) < 2:
            raise ValueError(f"{text!r}: is no text of two tokens, of which one is predicted")
        ends = [0] if is_cut else range(0, len(tokens) - 1, step)
        rows += [(0, tokens[i : i + model.max_len]) for i in ends]
    names = [f"row {i}" for i in range(len(rows))]
    return as_batch(rows, tokenizer.pad_token_id or 0, None, truncate=False, names=names)


def text_prompts(model: LanguageModel, texts: Sequence[str]) -> Prompts:
    """Return texts as they stand, outside any template, to be continued."""
    assert isinstance(model.words, ModelWords)
    rows = [model.words.tokenizer(text, verbose=False).input_ids for text in texts]
    lengths = np.array([len(tokens) for tokens in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return Prompts(tokens, lengths)


class TextScores(NamedTuple):
    """Four attacks' scores of each text, lower for what a model was trained on.

    Attributes:
        loss: mean loss per token, nats.
        zlib: that over the length of the compressed text.
        min_k: of the least likely tokens, the mean loss.
        min_k_plus_plus: the same in standard deviations.
    """

    loss: Float[np.ndarray, " n"]
    zlib: Float[np.ndarray, " n"]
    min_k: Float[np.ndarray, " n"]
    min_k_plus_plus: Float[np.ndarray, " n"]


def score_texts(
    model: LanguageModel, params: PyTree, rows: Batch, texts: Sequence[str], *, share: float
) -> TextScores:
    """Score texts, each of which is one row.

    Args:
        model: the language model's functions.
        params: the parameters.
        rows: `encode_texts` of the texts, cut.
        texts: the texts.
        share: of a text's tokens that Min-K and Min-K++ look at.
    """
    given = (model.apply, params, list(batches(rows, min(model.chunk, len(texts)))))
    loss = metrics.answer_nll_per_row(*given)
    return TextScores(
        loss,
        metrics.zlib_scores(loss, texts),
        metrics.min_k_scores(*given, share=share),
        metrics.min_k_plus_plus_scores(*given, share=share),
    )


def attack_numbers(known: TextScores, unseen: TextScores) -> dict[str, Measured]:
    """Return how well each attack tells the known texts from the unseen ones; 1/2: not at all."""
    return {
        f"AUC {name}": compared(metrics.membership_auc, known_scores, unseen_scores)
        for name, known_scores, unseen_scores in zip(TextScores._fields, known, unseen, strict=True)
    }


def answers_of(model: LanguageModel, params: PyTree, prompts: Prompts, num_steps: int) -> list[str]:
    """Return the greedy answers to prompts, in chunks of equal shape, each up to its end token."""
    num_steps = min(num_steps, model.num_positions + 1 - prompts.tokens.shape[1])
    tokens = likeliest_tokens(
        model.stepper,
        cast_params(params, model.dtype),
        prompts,
        num_steps,
        chunk=min(model.chunk, len(prompts.tokens)),
    )
    return model.words.answers(tokens)


def check_room(model: LanguageModel, prompts: Prompts, num_steps: int, what: str) -> None:
    """Refuse prompts that leave no room for an answer.

    Raises:
        ValueError: the longest prompt fills the model's positions.
    """
    if (longest := prompts.tokens.shape[1]) + num_steps > model.num_positions + 1:
        raise ValueError(
            f"{what}: the longest prompt has {longest} tokens, which with an answer of {num_steps} "
            f"is more than the model's {model.num_positions} positions."
        )


class AskedChoices(NamedTuple):
    """Multiple-choice questions, encoded once for all models: each option's letter is a row.

    Attributes:
        rows: the rows, those of a question one after the other.
        num_options: number of options of each question.
        answers: the right option of each question.
    """

    rows: Batch
    num_options: list[int]
    answers: np.ndarray


def encode_choices(
    model: LanguageModel, choices: Sequence[Choice], begin: str = ""
) -> AskedChoices:
    """Encode questions as lm-evaluation-harness asks WMDP's and MMLU's: options by letters.

    Args:
        model: the language model, in whose chat template, where it has one, nothing is put: the
            harness asks so by default.
        choices: the questions.
        begin: text before each question.

    Raises:
        ValueError: a question of more options than letters, or that is too long for the model.
    """
    assert isinstance(model.words, ModelWords)
    tokenizer = model.words.tokenizer
    start = tokenizer.bos_token or ""

    def render(question: str, answer: str) -> Rendered:
        return Rendered(f"{start}{question}\nAnswer:", answer, "")

    pairs = []
    for choice in choices:
        if not 1 < len(choice.choices) <= len(LETTERS):
            raise ValueError(f"{choice.question!r}: has {len(choice.choices)} options.")
        options = zip(LETTERS, choice.choices, strict=False)
        asked = "\n".join([begin + choice.question.strip(), *(f"{a}. {x}" for a, x in options)])
        pairs += [(asked, f" {letter}") for letter in LETTERS[: len(choice.choices)]]
    rows = model.words._replace(render=render).rows(pairs)
    if (width := rows.inputs.shape[1]) > model.num_positions:
        raise ValueError(
            f"the longest question has {width} tokens, more than the model's "
            f"{model.num_positions} positions."
        )
    number = [len(choice.choices) for choice in choices]
    return AskedChoices(rows, number, np.array([choice.answer for choice in choices]))


def choice_hits(model: LanguageModel, params: PyTree, asked: AskedChoices) -> np.ndarray:
    """Return for each question 1 where the right option's letter is the likeliest, else 0.

    NaN at all of them where a loss is not finite.
    """
    chunks = batches(asked.rows, min(model.chunk, len(asked.rows.inputs)))
    loss = metrics.answer_nll_sum_per_row(model.apply, params, list(chunks))
    if not np.isfinite(loss).all():  # a destroyed model finds no option likelier
        return np.full(len(asked.answers), np.nan)
    parts = np.split(loss, np.cumsum(asked.num_options)[:-1])
    # One question at a time, since they need not have the same number of options.
    return np.array(
        [
            metrics.multiple_choice_accuracy(part[None], [right])
            for part, right in zip(parts, asked.answers, strict=True)
        ]
    )
