"""What the catalogue's methods need, made from a model folder and its rows."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.checkpoint import Checkpoint
from jedit.core.batch import Apply, Batch
from jedit.core.paths import matcher
from jedit.curvature import Curvature, Estimator, choose_temperature, ekfac, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import QaRow, answers_only
from jedit.methods import fit_latents
from jedit.methods.row import Material, Need, Row
from jedit.models import load_stepper
from jedit.objectives import Dialogue
from jedit.recipes.alternates import sampled_alternates, sampled_tokens
from jedit.recipes.dialogue import Speaker, dialogue, room_for_answers
from jedit.recipes.factorizing import factorize_for
from jedit.recipes.fitting import rows_of
from jedit.recipes.folders.places import SELECT, hidden_site, written_layers
from jedit.recipes.folders.placing import cut
from jedit.recipes.folders.settings import Settings
from jedit.recipes.progress import Say
from jedit.recipes.scenes.question_answer import REFUSAL
from jedit.recipes.tofu.evaluation import ROOM
from jedit.recipes.tokenization import Words
from jedit.requests.forget import held_out
from jedit.requests.unseen import spread, take
from jedit.tracing import AttentionMaps, Entering

# What random numbers are drawn for, by place; "edit" is the method itself.
KEYS = ("edit", "attack", "alternates", "curvature", "corrected", "target_moments", "rest_moments")
KEYS += ("latents",)
CODED = 256  # retain rows whose states a sparse autoencoder is trained on; arbitrary
PROBED = 128  # retain rows that tell the temperature, as in `jedit.forget`


class Given(NamedTuple):
    """A folder's model with its rows, ready to be edited.

    Attributes:
        apply: `apply(params, tokens) -> logits`.
        params: its parameters.
        folder: where its stepper is read.
        words: its tokenizer.
        num_positions: number of positions that it has.
        forget: the rows to forget, as texts.
        retain: the rows to keep, as texts, in the order of their encoded set.
        sets: the encoded rows: "forget", "retain", and "unseen" where there are some.
        encode: makes a batch of rows.
        select: pattern of the parameters to edit; None: the method's own.
        say: a watcher.
        job: what the work is saved by; None: it is not.
        key: of everything random.
    """

    apply: Apply
    params: PyTree
    folder: Path
    words: Words
    num_positions: int
    forget: Sequence[QaRow]
    retain: Sequence[QaRow]
    sets: dict[str, Batch]
    encode: Callable[[Sequence[tuple[str, str]]], Batch]
    select: str | None
    say: Say
    job: Checkpoint | None
    key: Array

    def key_of(self, purpose: str) -> Array:
        """Return the random key of one of `KEYS`."""
        return jax.random.fold_in(self.key, KEYS.index(purpose))


def material_of(row: Row, given: Given, seen: Batch, settings: Settings) -> Material:
    """Make what a row of the catalogue needs.

    Curvatures are estimated by parts of the job, so that what was summed before it was broken off
    is not summed again.

    Args:
        row: the method.
        given: the model and its rows.
        seen: the retain rows that the edit may see.
        settings: how the edit is made.

    Raises:
        ValueError: the parameters to edit hold no matrix that it writes into.
    """
    apply, params, forget = given.apply, given.params, given.sets["forget"]
    made: dict[str, Any] = {"steps": settings.steps}
    fit = functools.partial(_fitted, given, settings)
    select, how = given.select or SELECT, factorize_for([row], settings.factorize)
    if row.needs & {Need.CURVATURE, Need.CORRECTED}:
        temperature = settings.temperature
        if temperature is None:
            probed = take(seen, spread(rows_of(seen), PROBED))
            chunks = cut(probed, settings)
            temperature = choose_temperature(apply, params, chunks)
        given.say(f"fitting K-FAC on the retain rows, temperature {temperature:g}")
        likelihood = Categorical(temperature)
        made["curvature"] = fit(
            "curvature", kfac(apply, likelihood, select=select, factorize=how), seen
        )
        if Need.CORRECTED in row.needs:
            given.say("correcting its eigenvalues")
            made["corrected"] = fit("corrected", ekfac(apply, likelihood, made["curvature"]), seen)
    for need, rows in ((Need.TARGET_MOMENTS, forget), (Need.REST_MOMENTS, seen)):
        if need in row.needs:
            given.say(f"taking {need.value}")
            estimator = kfac(apply, Categorical(), select=select, factorize=how)
            made[need.field] = fit(need.field, estimator, rows, answers_only)
    if Need.REFUSALS in row.needs:
        made["refusals"] = given.encode([(r.question, REFUSAL) for r in given.forget])
    if Need.ALTERNATES in row.needs:
        given.say("sampling alternate answers to the forget rows' questions")
        made["alternates"] = _alternates(given, settings)
    if Need.RETAIN in row.needs:
        made["retain"] = seen
    if Need.DIALOGUE in row.needs:
        made["dialogue"] = _dialogue(given, settings)
    if Need.HIDDEN_SITE in row.needs:
        made["hidden_site"] = hidden_site(params)
    if Need.ATTENTION in row.needs:
        made["attention"] = AttentionMaps()
    if Need.LATENTS in row.needs:
        given.say("training a sparse autoencoder of the last block's hidden states")
        rows = (take(seen, spread(rows_of(seen), CODED)), given.sets["unseen"])
        hidden, latents_key = Entering(hidden_site(params)), given.key_of("latents")
        made["latents"], _ = fit_latents(apply, params, hidden, *rows, key=latents_key)
    if Need.LAYERS in row.needs:
        is_edited = matcher(select, "select")
        made["layers"] = tuple(path for path in written_layers(params) if is_edited(path))
        if not made["layers"]:
            raise ValueError(
                f"{row.name} writes into the matrices where a block's perceptron ends "
                "(layers/N/mlp/down_proj/kernel), and --select names none of them"
            )
    if Need.SUBJECTS in row.needs:
        # Where the first token that is to be forgotten is read off, as in TOFU's comparison.
        made["subjects"] = jnp.argmax(jnp.asarray(forget.mask) > 0, axis=1).astype(jnp.int32)
    return Material(apply, params, forget, **made)


def _fitted(
    given: Given,
    settings: Settings,
    name: str,
    estimator: Estimator,
    rows: Batch,
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> Curvature:
    part = None if given.job is None else given.job.part(name)
    chunks = [change(batch) for batch in cut(rows, settings)]
    key = given.key_of(name)
    return estimate(estimator, given.params, chunks, key=key, checkpoint=part)


def _dialogue(given: Given, settings: Settings) -> Dialogue:
    """Return what RULE is taught by and asks.

    A rate is that of its second stage; the first has five times that, as by default.

    Raises:
        ValueError: some of the rows are texts without questions.
    """
    seen = held_out(Batch(jnp.arange(len(given.retain))))[0].inputs
    retain = [given.retain[i] for i in np.asarray(seen)]
    rows = [(row.question, row.answer) for row in (*given.forget, *retain)]
    if not all(question for question, _ in rows):
        raise ValueError("RULE asks questions, and some of the rows have none: they are texts")
    said = (given.words, given.encode)
    room = room_for_answers(*said, rows, spare=ROOM, num_positions=given.num_positions)
    made = dialogue(Speaker(load_stepper(given.folder), *said, room), given.forget, retain)
    if (rate := settings.learning_rate) is None:
        return made
    return made._replace(rate=rate, tuning_rate=rate * made.tuning_rate / made.rate)


def _alternates(given: Given, settings: Settings) -> Batch:
    """Return the forget rows' questions with what the model says to them, drawn until it is wrong.

    A row's own `alternate_answer` goes first.
    """
    stepper = load_stepper(given.folder)
    asked = given.words.prompts([(row.question, row.answer) for row in given.forget])
    longest = int(np.asarray(given.sets["forget"].mask).sum(axis=1).max()) + ROOM
    num_steps = min(longest, given.num_positions + 1 - asked.tokens.shape[1])
    chunk = min(settings.batch_size, len(given.forget))

    def ask(key: Array, temperature: float) -> list[str]:
        how = {"chunk": chunk, "key": key, "temperature": temperature}
        return given.words.answers(sampled_tokens(stepper, given.params, asked, num_steps, **how))

    key = given.key_of("alternates")
    return given.encode(sampled_alternates(given.forget, ask, key=key))
