"""Questions and answers for RULE: refusals to tune on, answers drawn by the model, their rewards.

The prompts, the drawn tokens and the rewards of their texts meet here, on the host; what is learnt
from them is arrays.  Drawn tokens are put behind the prompt as they are, not decoded and encoded
again, which would not always give them back.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int32, PyTree

from jedit.core.batch import Batch
from jedit.data import Prompts, QaRow
from jedit.methods.row import Pace
from jedit.metrics import answer_rewards, refusal_rewards
from jedit.models import Stepper, cast_params
from jedit.objectives import Dialogue, Played
from jedit.recipes.alternates import sampled_tokens
from jedit.recipes.tokenization import Words
from jedit.requests.unseen import spread, take

FORGET_SHARE, BOUNDARY_SHARE = 0.12, 0.08  # RULE's
GROUP = 8  # RULE's answers to a question
QUESTIONS = 8  # of each kind in a draw, at most; arbitrary
CHUNK = 128  # prompts that are continued at a time; arbitrary
# RULE's reward asks for a refusal that names its target; in several words, so that what is learnt
# is more than one text.
REFUSALS = (
    "I do not know anything about {target}.",
    "I have no information about {target}.",
    "I'm not sure, as I am not familiar with {target}.",
    "I'm afraid that I cannot say anything about {target}.",
)
NAMELESS = "I do not know."
FIELDS = ("target", "author", "subject")
CAPITALISED = re.compile(r"(?<=\s)[A-Z][\w'\u2019-]*(?:\s+[A-Z][\w'\u2019-]*)*")
NO_NAME = re.compile(r"['\u2019]s?(?=\s|$)|(?<!\S)I(?:['\u2019]\w+)?(?=\s|$)")


def target_of(row: QaRow) -> str:
    """Return what a row is about: its field "target", "author" or "subject", else a name in it.

    A field counts if its text stands in the question: TOFU's author is a number that no answer
    names. A name is the first of the longest runs of capitalised words that do not begin the
    question, up to a possessive; "" if there is none. Of several names, a person's and a
    town's, nothing tells which is meant.
    """
    given = (row.fields.get(name) for name in FIELDS)
    asked = row.question.lower()
    for text in given:
        if isinstance(text, str) and text and text.lower() in asked:
            return text
    runs = (NO_NAME.split(run) for run in CAPITALISED.findall(row.question))
    names = [name.strip() for run in runs for name in run]
    return max(names, key=lambda name: len(name.split()), default="")


def refusal_to(row: QaRow, number: int) -> str:
    """Return a refusal that names what the row is about; another number may get another one."""
    target = target_of(row)
    return REFUSALS[number % len(REFUSALS)].format(target=target) if target else NAMELESS


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model that answers, with its words.

    Attributes:
        stepper: the model, one position at a time.
        words: its tokenizer.
        encode: makes a batch of questions with answers, of one width.
        num_steps: number of tokens of an answer, at most.
        temperature: of the draws; 1, the policy itself, as GRPO's gradient assumes.
        dtype: dtype of the stepper's computation; None: that of the parameters.
    """

    stepper: Stepper
    words: Words
    encode: Callable[[Sequence[tuple[str, str]]], Batch]
    num_steps: int
    temperature: float = 1.0
    dtype: DTypeLike | None = None


def room_for_answers(
    words: Words,
    encode: Callable[[Sequence[tuple[str, str]]], Batch],
    rows: Sequence[tuple[str, str]],
    *,
    spare: int,
    num_positions: int,
) -> int:
    """Return the tokens of the longest known answer and some to spare, as far as there is room."""
    longest = int(np.asarray(encode(rows).mask).sum(axis=1).max()) + spare
    return min(longest, num_positions + 1 - words.prompts(rows).tokens.shape[1])


def dialogue(
    speaker: Speaker,
    forget: Sequence[QaRow],
    retain: Sequence[QaRow],
    *,
    forget_share: float = FORGET_SHARE,
    boundary_share: float = BOUNDARY_SHARE,
    rates: Mapping[Pace, tuple[float, ...]] | None = None,
) -> Dialogue:
    """Make RULE's material of shares of both sets, taken evenly.

    Args:
        speaker: the model that answers.
        forget: rows whose questions are to be refused.
        retain: rows whose questions are to be answered.
        forget_share: share of the forget rows that is used; 0.12, RULE's.
        boundary_share: share of the retain rows that is used; 0.08, RULE's.
        rates: of a grid, by pace: both stages learn at the largest and at the smallest for a
            bounded objective; None: at `Dialogue`'s.

    Raises:
        ValueError: the questions leave no room for an answer.
    """
    if speaker.num_steps < 1:
        raise ValueError("a question is as long as the model's positions: it cannot be answered")
    refused, answered = (
        [rows[i] for i in spread(len(rows), max(1, round(share * len(rows))))]
        for rows, share in ((forget, forget_share), (retain, boundary_share))
    )
    texts = [(row.question, refusal_to(row, i)) for i, row in enumerate(refused)]
    # Together, as what is encoded apart may have another width.
    encoded = speaker.encode([*texts, *((row.question, row.answer) for row in answered)])
    cut = len(texts)
    made = Dialogue(
        take(encoded, np.arange(cut)),
        take(encoded, np.arange(cut, cut + len(answered))),
        _Play(speaker, tuple(refused), tuple(answered)),
    )
    usual = (rates or {}).get(Pace.BOUNDED)
    return made._replace(tuning_rate=max(usual), rate=min(usual)) if usual else made


@dataclasses.dataclass(frozen=True)
class _Play:
    """Asks some questions of both kinds, and judges the answers by RULE's rewards."""

    speaker: Speaker
    refused: tuple[QaRow, ...]
    answered: tuple[QaRow, ...]

    def __call__(self, params: PyTree, *, key: Array) -> Played:
        speaker = self.speaker
        pick, draw = (jax.random.fold_in(key, i) for i in range(2))
        chosen = []
        for i, rows in enumerate((self.refused, self.answered)):
            order = jax.random.permutation(jax.random.fold_in(pick, i), len(rows))
            chosen.append([rows[k] for k in np.asarray(order[:QUESTIONS])])
        asked = [row for rows in chosen for row in rows for _ in range(GROUP)]
        # The widths are those of all questions, so that every draw runs the same program.
        everybody = [(row.question, row.answer) for row in (*self.refused, *self.answered)]
        width = speaker.words.prompts(everybody).tokens.shape[1]
        prompts = speaker.words.prompts([(row.question, row.answer) for row in asked])
        tokens = np.pad(prompts.tokens, ((0, 0), (0, width - prompts.tokens.shape[1])))
        prompts = Prompts(tokens, prompts.lengths)
        if speaker.dtype is not None:
            params = cast_params(params, speaker.dtype)
        drawn = sampled_tokens(
            speaker.stepper,
            params,
            prompts,
            speaker.num_steps,
            chunk=min(CHUNK, len(asked)),
            key=draw,
            temperature=speaker.temperature,
        )
        texts = speaker.words.answers(drawn)
        cut = len(chosen[0]) * GROUP
        rewards = np.concatenate(
            [
                refusal_rewards(texts[:cut], [target_of(row) for row in asked[:cut]]),
                answer_rewards(texts[cut:], [row.answer for row in asked[cut:]]),
            ]
        )
        rows = continued(prompts, drawn, ends=speaker.words.ends)
        return Played(rows, rewards.reshape(-1, GROUP))


def continued(
    prompts: Prompts, drawn: Int32[np.ndarray, "n steps"], *, ends: frozenset[int]
) -> Batch:
    """Return prompts with what was drawn after them, up to its end token, which counts.

    Args:
        prompts: what was continued.
        drawn: the tokens after each prompt.
        ends: the tokens that end an answer.

    Returns:
        A batch as `encode_rows` makes it, as wide as all prompts and all steps.
    """
    (count, width), steps = prompts.tokens.shape, drawn.shape[1]
    is_end = np.isin(drawn, sorted(ends))
    lengths = np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, steps)
    tokens = np.zeros((count, width + steps), np.int32)
    tokens[:, :width] = prompts.tokens
    mask = np.zeros((count, width + steps - 1), np.float32)
    valid = np.zeros_like(mask)
    for i, (start, length) in enumerate(zip(prompts.lengths, lengths, strict=True)):
        tokens[i, start : start + length] = drawn[i, :length]
        mask[i, start - 1 : start - 1 + length] = 1
        valid[i, : start - 1 + length] = 1
    return Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], mask, valid)))
