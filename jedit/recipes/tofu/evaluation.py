"""What TOFU and its successors measure on one model, by question set."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.data import Prompts, QaRow, batches, pack
from jedit.data.text import Spans
from jedit.methods.row import Pace
from jedit.metrics import SetUtility
from jedit.models import Stepper, cached_decode, cast_params
from jedit.objectives import Dialogue
from jedit.recipes.alternates import sampled_alternates, sampled_tokens
from jedit.recipes.dialogue import Speaker, dialogue, room_for_answers
from jedit.recipes.fitting import rows_of
from jedit.recipes.tokenization import Words

STEP = 32  # of the widths of encoded rows, so that few of them are compiled for
ROOM = 8  # tokens that an answer may be longer than the longest true one


class LanguageModel(NamedTuple):
    """A model's functions and its words; parameters come with each call.

    Attributes:
        apply: `apply(params, tokens) -> logits`.
        stepper: the same model one position at a time, for generation.
        words: a tokenizer with its way to write rows, `OwnWords` or `ModelWords`.
        max_len: number of tokens of a row, at most; longer rows are cut off.
        num_positions: number of positions that the model has.
        chunk: number of rows evaluated at a time.
        dtype: dtype of the computation; `apply` casts to it by itself, what the stepper is given is
            cast.
    """

    apply: Callable
    stepper: Stepper
    words: Words
    max_len: int
    num_positions: int
    chunk: int = 32
    dtype: DTypeLike = np.float32

    def encode(
        self, pairs: Sequence[tuple[str, str]], spans: Sequence[Spans] | None = None
    ) -> Batch:
        """Encode questions with answers, as wide as the longest and a multiple of `STEP`.

        Args:
            pairs: questions with their answers.
            spans: by row the characters of its answer that count; None, or none of a row: all.

        Raises:
            ValueError: nothing of what counts of an answer is left when the row is cut off.
        """
        lengths = np.asarray(self.words.rows(pairs).valid).sum(axis=1)
        width = min(-(-int(lengths.max() + 1) // STEP) * STEP, self.max_len)
        encoded = self.words.rows(pairs, width, spans)
        if np.any(is_cut := np.asarray(encoded.mask).sum(axis=1) == 0):
            question, _ = pairs[int(np.argmax(is_cut))]
            if spans is not None and spans[int(np.argmax(is_cut))]:
                raise ValueError(
                    f"{question!r}: nothing of what is marked in the answer (forget_span) is among "
                    f"the first {self.max_len} tokens. Give a larger max_len."
                )
            raise ValueError(
                f"{question!r} alone fills the model's {self.max_len} tokens: no answer is left "
                "of the row. Give a larger max_len or vocabulary."
            )
        return encoded

    def packed(self, pairs: Sequence[tuple[str, str]]) -> list[Batch]:
        """Encode rows packed into few sequences, by chunks: half of what is padded is padding."""
        sequences = pack(self.encode(pairs), self.max_len).batch
        return list(batches(sequences, min(self.chunk, rows_of(sequences))))

    def num_cut(self, rows: Sequence[QaRow]) -> int:
        """Count the right, paraphrased and wrong answers that do not fit behind their questions."""
        pairs = [
            (row.question, answer)
            for row in rows
            for answer in (row.answer, row.paraphrased_answer, *row.perturbed_answer)
            if answer
        ]
        lengths = np.asarray(self.words.rows(pairs).valid).sum(axis=1)
        return int(np.sum(lengths >= self.max_len))


class Questions(NamedTuple):
    """A set of questions, encoded once for all models.

    Attributes:
        rows: the questions with all their answers.
        answers: batches of the questions with their true answers.
        paraphrases: batches of the questions with the true answers in other words; None where there
            are none, and the true answers stand for them.
        wrong: batches of the questions with wrong answers, `num_wrong` to each, one after the
            other.
        num_wrong: number of wrong answers to each question.
        prompts: the questions alone, to be continued.
        num_steps: number of tokens to generate.
    """

    rows: list[QaRow]
    answers: list[Batch]
    paraphrases: list[Batch] | None
    wrong: list[Batch]
    num_wrong: int
    prompts: Prompts
    num_steps: int


class SetScores(NamedTuple):
    """One number of each kind for each question, and what the model answers.

    Attributes:
        loss: loss of the true answer, per token.
        probability: probability of the true answer, or its share among the choices.
        paraphrased_loss: loss of the paraphrase per token, or of the true answer where there is
            none.
        wrong_loss: losses of the wrong answers, per token.
        truth_ratio: TR, the truth ratio of the wrong answers to the paraphrase.
        rouge: ROUGE-L recall of the greedy answer.
        generations: texts of the greedy answers.
    """

    loss: Float[np.ndarray, " n"]
    probability: Float[np.ndarray, " n"]
    paraphrased_loss: Float[np.ndarray, " n"]
    wrong_loss: Float[np.ndarray, "n num_wrong"]
    truth_ratio: Float[np.ndarray, " n"]
    rouge: Float[np.ndarray, " n"]
    generations: list[str]

    @property
    def utility(self) -> SetUtility:
        """Return the three means of the set."""
        return metrics.set_utility(self.probability, self.rouge, self.truth_ratio)


def encode_questions(model: LanguageModel, rows: Sequence[QaRow]) -> Questions:
    """Encode a set of questions once for all models.

    Raises:
        ValueError: a question has no wrong answers.
    """
    num_wrong = min(len(row.perturbed_answer) for row in rows)
    if not num_wrong:
        raise ValueError("every question needs wrong answers (perturbed_answer)")
    has_paraphrases = all(row.paraphrased_answer for row in rows)

    def encoded(pairs: list[tuple[str, str]]) -> list[Batch]:
        return list(batches(model.encode(pairs), min(model.chunk, len(pairs))))

    answers = encoded([(r.question, r.answer) for r in rows])
    answer_tokens = max(int(np.asarray(batch.mask).sum(axis=1).max()) for batch in answers)
    return Questions(
        rows=list(rows),
        answers=answers,
        paraphrases=model.packed([(r.question, r.paraphrased_answer or "") for r in rows])
        if has_paraphrases
        else None,
        wrong=model.packed([(r.question, w) for r in rows for w in r.perturbed_answer[:num_wrong]]),
        num_wrong=num_wrong,
        prompts=model.words.prompts([(r.question, r.answer) for r in rows]),
        num_steps=answer_tokens + ROOM,
    )


def score_set(model: LanguageModel, params: PyTree, asked: Questions) -> SetScores:
    """Score a model on a set, by TOFU's definitions.

    Sets without paraphrases are multiple choice: their probability is the true answer's share.
    """
    right, wrong = _losses(model, params, asked)
    if asked.paraphrases is None:
        loss, probability = right, metrics.normalized_probability(right, wrong)
    else:
        loss = metrics.answer_nll_per_row(model.apply, params, asked.answers)
        probability = metrics.answer_probability(loss)
    texts = generate(model, params, asked.prompts, asked.num_steps)
    answers = [row.answer for row in asked.rows]
    ratios = metrics.truth_ratio(right, wrong)
    # A destroyed model can hold a wrong answer infinitely likelier than the right one.
    ratios = np.nan_to_num(ratios, nan=1e30, posinf=1e30)
    rouge = metrics.rouge(answers, texts).rougeL_recall
    return SetScores(loss, np.nan_to_num(probability), right, wrong, ratios, rouge, texts)


def truth_ratios(model: LanguageModel, params: PyTree, asked: Questions) -> np.ndarray:
    """Return the truth ratio of each question, without asking the model to generate."""
    return metrics.truth_ratio(*_losses(model, params, asked))


def _losses(
    model: LanguageModel, params: PyTree, asked: Questions
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n num_wrong"]]:
    """Return the losses per token of the paraphrases (or true answers) and of the wrong answers."""
    right = metrics.answer_nll_per_row(model.apply, params, asked.paraphrases or asked.answers)
    wrong = metrics.answer_nll_per_row(model.apply, params, asked.wrong)
    return right, wrong.reshape(len(right), asked.num_wrong)


def alternates(model: LanguageModel, params: PyTree, asked: Questions, *, key: Array) -> Batch:
    """Return the questions with what the model says to them, drawn until it is wrong."""
    params = cast_params(params, model.dtype)
    num_steps = min(asked.num_steps, model.num_positions + 1 - asked.prompts.tokens.shape[1])
    chunk = min(model.chunk, len(asked.rows))

    def ask(key: Array, temperature: float) -> list[str]:
        given = (model.stepper, params, asked.prompts, num_steps)
        tokens = sampled_tokens(*given, chunk=chunk, key=key, temperature=temperature)
        return model.words.answers(tokens)

    return model.encode(sampled_alternates(asked.rows, ask, key=key))


def dialogue_of(
    model: LanguageModel,
    forget: Sequence[QaRow],
    retain: Sequence[QaRow],
    rates: Mapping[Pace, tuple[float, ...]] | None = None,
) -> Dialogue:
    """Return what RULE is taught by and asks, at rates of a grid or at its own."""
    rows = [(row.question, row.answer) for row in (*forget, *retain)]
    said = (model.words, model.encode)
    room = room_for_answers(*said, rows, spare=ROOM, num_positions=model.num_positions)
    speaker = Speaker(model.stepper, *said, room, dtype=model.dtype)
    return dialogue(speaker, forget, retain, rates=rates)


def generate(model: LanguageModel, params: PyTree, prompts: Prompts, num_steps: int) -> list[str]:
    """Generate the greedy answers to the prompts, each up to its end token."""
    # Never beyond the positions the model has; what is cut off so is an answer gone astray.
    num_steps = min(num_steps, model.num_positions + 1 - prompts.tokens.shape[1])
    tokens = cached_decode(
        model.stepper,
        cast_params(params, model.dtype),
        prompts.tokens,
        num_steps,
        prompt_lengths=prompts.lengths,
    )
    return model.words.answers(np.asarray(tokens))
