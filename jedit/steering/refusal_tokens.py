"""Refusal tokens (Jain et al., arXiv 2412.06748): a threshold decides what is refused.

In training the answer to a row begins with one token more, which says what is done with it:

    [refuse: c] I cannot say that.      where the row is refused, and for which reason c
    [respond] She was born in Cusco.    where it is answered

At inference the model's own probability of these tokens, after the question, is read off, a rule
chooses one of them, and the answer is what the model says after it.  So how much is refused, and of
which category, is set without training again.

    p_c    probability of the refusal token of category c        q     of [respond]
    t_c    threshold of a category        b_c   bias of its logit        S     the chosen categories

    by category   c* = argmax_c p_c over all;  c* in S: refuse by c* if p_c* >= t_c*, else respond
                                               c* not in S: what the model itself finds likelier
    by sum        refuse, by the likeliest category of S, if  sum of p_c over S  >= t, else respond
    by bias       the likeliest of  log q  and all  log p_c + b_c

With one category the last is the first at the threshold 1 / (1 + e^b) of p_c / (p_c + q).

Differences.  By category is the released code's rule [code], which has one threshold for all of S;
ours has one for each.  Where c* is not in S the code takes the likeliest token of the whole
vocabulary; ours the likelier of c*'s and [respond], so that every answer begins with one of the
tokens [ours].  The code ends with its softmax at a temperature of 2, left over from a loop; ours is
the model's.  The sum and the bias are the paper's, as the notes have them [notes]; the texts of the
tokens are ours.  Refused and answered rows that are near to one another are what the threshold
learns its boundary from [paper].
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import FINITE, SHARE, check_finite, check_numbers, is_known
from jedit.core.display import short_repr
from jedit.core.precision import wide
from jedit.core.row_blocks import in_row_blocks

RESPOND = "[respond]"


class RefusalTokens(NamedTuple):
    """The tokens that an answer may begin with, by their numbers in the vocabulary.

    Attributes:
        categories: names of the reasons to refuse.
        refuse: the token of each category.
        respond: the token of an answer.
    """

    categories: tuple[str, ...]
    refuse: tuple[int, ...]
    respond: int


class Decision(NamedTuple):
    """What was decided about each question.

    Attributes:
        tokens: the token that the answer is to begin with.
        categories: index of the category that is refused, -1 for an answer.
    """

    tokens: Int[Array, " n"]
    categories: Int[Array, " n"]

    __repr__ = short_repr

    @property
    def refused(self) -> np.ndarray:
        """Return which questions are refused, as NumPy booleans."""
        return np.asarray(self.categories) >= 0


def refusal_text(category: str | None) -> str:
    """Return the text of a category's token; None is the token of an answer."""
    return RESPOND if category is None else f"[refuse: {category}]"


def add_refusal_tokens(tokenizer: Any, categories: Sequence[str]) -> tuple[Any, RefusalTokens]:
    """Give a tokenizer the tokens of these categories and that of an answer, at its end.

    They take the space before them in, so that they are the first token of an answer, and are
    left out of decoded texts. A model that was made for fewer tokens has no rows for them; of one
    with tokens to spare, give these as `RefusalTokens`.

    Args:
        tokenizer: a tokenizer of the package tokenizers, such as `train_tokenizer` returns.
        categories: names of the reasons to refuse, each once.

    Returns:
        A copy of the tokenizer, and the numbers of the tokens.

    Raises:
        ValueError: there are no categories, or one stands twice.
    """
    names = (categories,) if isinstance(categories, str) else tuple(categories)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"categories must be different names, at least one; got {list(names)}")
    from tokenizers import AddedToken  # late: it is the extra demo's

    copy = type(tokenizer).from_str(tokenizer.to_str())
    texts = [refusal_text(name) for name in (*names, None)]
    copy.add_special_tokens([AddedToken(text, lstrip=True, special=True) for text in texts])
    numbers = [copy.token_to_id(text) for text in texts]
    return copy, RefusalTokens(names, tuple(numbers[:-1]), numbers[-1])


def mark_answers(
    rows: Sequence[tuple[str, str]], categories: Sequence[str | None]
) -> list[tuple[str, str]]:
    """Put the token's text before each answer, for training.

    Args:
        rows: pairs of a question and its answer, which is the refusal where it is to be refused.
        categories: of each row the reason why it is refused, None where it is answered.

    Raises:
        ValueError: there are not as many categories as rows.
    """
    if len(rows) != len(categories):
        raise ValueError(f"expected one category per row, got {len(categories)} for {len(rows)}")
    return [
        (question, f"{refusal_text(category)} {answer}")
        for (question, answer), category in zip(rows, categories, strict=True)
    ]


def refusal_probabilities(
    apply: Apply,
    params: PyTree,
    tokens: RefusalTokens,
    prompt_tokens: Int[Array | np.ndarray, "n seq"],
    prompt_lengths: Int[Array | np.ndarray, " n"],
) -> Float[Array, "n tokens"]:
    """Return the model's probability of each token after each question, [respond]'s the last.

    Args:
        apply: `(params, tokens) -> logits`, causal.
        params: the model's parameters.
        tokens: the tokens that are asked for.
        prompt_tokens: the questions, right padded.
        prompt_lengths: the tokens of each question that count.

    Returns:
        Probabilities in float32 or wider, in one forward pass; they sum to one minus what the model
        gives to other words.

    Raises:
        ValueError: a length that is none of the questions'.
        FloatingPointError: the model's outputs are no numbers, which no rule could decide by.
    """
    seq = prompt_tokens.shape[1]
    if is_known(prompt_lengths):
        lengths = np.asarray(prompt_lengths)
        if np.any((lengths < 1) | (lengths > seq)):
            raise ValueError(f"prompt_lengths must be from 1 to {seq}; got {lengths.tolist()}")
    columns = jnp.asarray((*tokens.refuse, tokens.respond))
    batch = Batch(jnp.asarray(prompt_tokens), jnp.asarray(prompt_lengths) - 1)
    found = _read(apply, params, columns, batch)
    check_finite("the probabilities of refusal tokens", found, "the model's outputs are no numbers")
    return found


@functools.partial(jax.jit, static_argnums=0)
def _read(apply: Apply, params: PyTree, columns: Array, batch: Batch) -> Array:
    def read(outputs: tuple[Array, ...], batch: Batch) -> Array:
        last = jnp.asarray(batch.targets)
        here = jnp.take_along_axis(outputs[0], last[:, None, None], axis=1)[:, 0]
        return jax.nn.softmax(wide(here), axis=-1)[:, columns]

    return in_row_blocks(read, apply, (params,), batch)


def refuse_by_category(
    probabilities: Float[Array, "n tokens"],
    tokens: RefusalTokens,
    thresholds: Mapping[str, float],
) -> Decision:
    """Refuse where the likeliest refusal token reaches its category's threshold.

    Args:
        probabilities: those of `refusal_probabilities`.
        tokens: the tokens.
        thresholds: by category, from 0 to 1; of one that is not named the model decides.

    Raises:
        ValueError: a category has no token, or a threshold is no probability.
    """
    given = _by_category(tokens, thresholds, "thresholds").astype(probabilities.dtype)
    check_numbers(SHARE, thresholds=np.array(list(thresholds.values())))
    refusals, respond = probabilities[:, :-1], probabilities[:, -1]
    winner = jnp.argmax(refusals, axis=-1)
    best = jnp.take_along_axis(refusals, winner[:, None], axis=-1)[:, 0]
    own = jnp.isnan(given)[winner]
    return _decided(tokens, winner, jnp.where(own, best > respond, best >= given[winner]))


def refuse_by_sum(
    probabilities: Float[Array, "n tokens"],
    tokens: RefusalTokens,
    threshold: float,
    *,
    categories: Sequence[str] | None = None,
) -> Decision:
    """Refuse where the refusal tokens together reach a threshold: one switch for all of them.

    Args:
        probabilities: those of `refusal_probabilities`.
        tokens: the tokens.
        threshold: a probability.
        categories: which of them are summed up, and may be refused; None: all.

    Raises:
        ValueError: a category has no token, or the threshold is no probability.
    """
    check_numbers(SHARE, threshold=threshold)
    names = tokens.categories if categories is None else tuple(categories)
    is_asked = ~jnp.isnan(_by_category(tokens, dict.fromkeys(names, 0.0), "categories"))
    refusals = jnp.where(is_asked[None], probabilities[:, :-1], 0)
    return _decided(tokens, jnp.argmax(refusals, axis=-1), refusals.sum(-1) >= threshold)


def refuse_by_bias(
    probabilities: Float[Array, "n tokens"], tokens: RefusalTokens, biases: Mapping[str, float]
) -> Decision:
    """Refuse where a refusal token is likelier than [respond], after its logit is raised.

    Args:
        probabilities: those of `refusal_probabilities`.
        tokens: the tokens.
        biases: by category what is added to its token's logit; 0 for those that are not named.

    Raises:
        ValueError: a category has no token, or a bias is not finite.
    """
    check_numbers(FINITE, biases=np.array(list(biases.values())))
    added = jnp.nan_to_num(_by_category(tokens, biases, "biases")).astype(probabilities.dtype)
    scores = jnp.log(probabilities).at[:, :-1].add(added[None])
    winner = jnp.argmax(scores[:, :-1], axis=-1)
    return _decided(tokens, winner, scores[:, :-1].max(-1) > scores[:, -1])


def begin_answers(
    prompt_tokens: Int[Array | np.ndarray, "n seq"],
    prompt_lengths: Int[Array | np.ndarray, " n"],
    decision: Decision,
) -> tuple[Int[Array, "n longer"], Int[Array, " n"]]:
    """Put each decision's token behind its question, to be continued by `cached_decode`.

    Returns:
        Tokens of one position more, and the lengths, each one more.
    """
    lengths = jnp.asarray(prompt_lengths)
    longer = jnp.pad(jnp.asarray(prompt_tokens), ((0, 0), (0, 1)))
    rows = jnp.arange(len(longer))
    return longer.at[rows, lengths].set(decision.tokens.astype(longer.dtype)), lengths + 1


def _by_category(
    tokens: RefusalTokens, given: Mapping[str, float], name: str
) -> Float[Array, " categories"]:
    """Return the numbers in the order of the tokens, NaN where none is given.

    Raises:
        ValueError: a category has no token.
    """
    if unknown := [category for category in given if category not in tokens.categories]:
        raise ValueError(
            f"{name} names {unknown}, which have no refusal token; those that have one are "
            f"{list(tokens.categories)}"
        )
    return jnp.asarray([float(given.get(category, np.nan)) for category in tokens.categories])


def _decided(tokens: RefusalTokens, winner: Array, is_refused: Array) -> Decision:
    refuse = jnp.asarray(tokens.refuse)[winner]
    return Decision(
        jnp.where(is_refused, refuse, tokens.respond), jnp.where(is_refused, winner, -1)
    )
