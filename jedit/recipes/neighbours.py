"""Before and after an edit, by domain: what it did to rows that it was not given.

    domain_of(row)    the name of a row's domain: a region, a genre, the entity that it is about
    nearness          of a domain's hidden states to those of the rows forgotten, before the edit

An edit that teaches a model to refuse one author may make it refuse others of the same land too;
the nearness says where to look.  `jedit audit --group FIELD` tells the same of two folders.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit import metrics
from jedit.core.batch import Apply, Batch
from jedit.data import QaRow
from jedit.models import cast_params
from jedit.objectives.hidden_states import Hidden
from jedit.recipes.alternates import likeliest_tokens
from jedit.recipes.dialogue import CHUNK, Speaker
from jedit.report.domains import Domain, by_nearness


def effects_by_domain(
    apply: Apply,
    models: tuple[PyTree, PyTree],
    forget: Sequence[QaRow],
    rows: Sequence[QaRow],
    *,
    domain_of: Callable[[QaRow], str],
    speaker: Speaker,
    hidden: Hidden,
) -> tuple[Domain, ...]:
    """Measure refusals and utility of each domain under the model before and the model after.

    Args:
        apply: `apply(params, tokens) -> logits`.
        models: parameters before and after the edit.
        forget: the rows that were to be forgotten; only their hidden states are looked at.
        rows: other rows, with their right answers; those that no edit saw tell most.
        domain_of: the name of a row's domain; two domains at least.
        speaker: the same model as it answers; its answers are the likeliest ones.
        hidden: `(apply, params, inputs) -> states` with the outputs' leading shape; those are read
            where a question ends.

    Returns:
        The domains, the nearest first.

    Raises:
        ValueError: what `metrics.nearness` refuses; the questions leave no room for an answer.
    """
    if speaker.num_steps < 1:
        raise ValueError("a question is as long as the model's positions: it cannot be answered")
    domains = [domain_of(row) for row in rows]
    names = tuple(dict.fromkeys(domains))
    of = lambda name: [r for r, d in zip(rows, domains, strict=True) if d == name]  # noqa: E731
    near = metrics.nearness(
        apply,
        models[0],
        at_question_ends(_encoded(speaker, forget)),
        {name: at_question_ends(_encoded(speaker, of(name))) for name in names},
        hidden=hidden,
    )
    answers = [row.answer for row in rows]
    batch = _encoded(speaker, rows)
    scores: dict[str, list[np.ndarray]] = {"refusal": [], "probability": [], "rouge": []}
    for params in models:
        said = likeliest_answers(speaker, params, rows)
        loss = metrics.answer_nll_per_row(apply, params, batch)
        scores["refusal"].append(metrics.refuses(said).astype(float))
        # To a model that is destroyed no answer is likely.
        scores["probability"].append(np.nan_to_num(metrics.answer_probability(loss)))
        scores["rouge"].append(metrics.rouge(answers, said).rougeL_recall)
    return domains_of(scores, domains, near)


def domains_of(
    scores: Mapping[str, Sequence[np.ndarray]], domains: Sequence[str], near: Mapping[str, float]
) -> tuple[Domain, ...]:
    """Return what happened to each domain, the nearest first.

    Args:
        scores: by "refusal", "probability" and "rouge" the rows' scores before and after, (n,)
            each.
        domains: name of each row's domain.
        near: nearness of each domain.
    """
    changes = {k: metrics.change_by_group(x[0], x[1], domains) for k, x in scores.items()}
    found = [
        Domain(n, near[n], changes["refusal"][n], changes["probability"][n], changes["rouge"][n])
        for n in dict.fromkeys(domains)
    ]
    return tuple(by_nearness(found))


def at_question_ends(batch: Batch) -> Batch:
    """Return rows of which the first output of the answer alone counts: the question is read."""
    mask = np.asarray(batch.mask) > 0
    first = mask & (np.cumsum(mask, axis=1) == 1)
    return batch._replace(mask=jnp.asarray(first, jnp.float32))


def likeliest_answers(speaker: Speaker, params: PyTree, rows: Sequence[QaRow]) -> list[str]:
    """Return what a model says to each question, taking the likeliest token each time."""
    prompts = speaker.words.prompts([(row.question, row.answer) for row in rows])
    if speaker.dtype is not None:
        params = cast_params(params, speaker.dtype)
    chunk = min(CHUNK, len(rows))
    given = (speaker.stepper, params, prompts, speaker.num_steps)
    return speaker.words.answers(likeliest_tokens(*given, chunk=chunk))


def _encoded(speaker: Speaker, rows: Sequence[QaRow]) -> Batch:
    return speaker.encode([(row.question, row.answer) for row in rows])
