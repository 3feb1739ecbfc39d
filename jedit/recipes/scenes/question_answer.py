"""Question-answer rows and a small GPT: train, retrain without some rows, edit, compare, ask."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.data import (
    QaRow,
    batches,
    decode_answers,
    encode_rows,
    prompts_of,
    text_of,
    train_tokenizer,
)
from jedit.methods.row import Need
from jedit.metrics import answer_nll_per_row, truth_ratio
from jedit.models import gpt, gpt_stepper, greedy_decode
from jedit.objectives import Dialogue
from jedit.recipes.alternates import sampled_alternates, sampled_tokens
from jedit.recipes.by_itself import run_by_itself
from jedit.recipes.comparison.compare import compare
from jedit.recipes.comparison.judge import Judge
from jedit.recipes.comparison.task import Grid, Task
from jedit.recipes.dialogue import Speaker, dialogue
from jedit.recipes.factorizing import factorize_for, told
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.named import check_grid, check_methods
from jedit.recipes.progress import Say, Within
from jedit.recipes.tokenization import OwnWords
from jedit.report import Answer, Comparison
from jedit.requests import Unseen
from jedit.requests.unseen import spread

# K-FADE edits the matrices of the blocks: what an embedding or a norm has learned serves every row.
SELECT = r"blocks/.*/kernel"
SHARE_SEEN = 0.7
ANSWER_TOKENS = 40
REFUSAL = "I do not know."


class Model(NamedTuple):
    """The size of the GPT and of its vocabulary.

    Attributes:
        width: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads.
        vocab: number of tokens, at most.
        max_len: number of tokens of a row, at most; longer rows are cut off at the right, and
            counted.
    """

    width: int
    layers: int
    heads: int
    vocab: int
    max_len: int

    def make(self, vocab: int, num_positions: int, *, key: Array) -> tuple[Callable, PyTree]:
        """Make the function and the initial params for these numbers of tokens and positions."""
        return gpt(
            key=key,
            vocab=vocab,
            width=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            max_len=num_positions,
        )


class Sets(NamedTuple):
    """The rows of one comparison; `kept` is all training rows but the forgotten ones."""

    data: list[QaRow]
    forget: list[QaRow]
    kept: list[QaRow]
    seen: list[QaRow]
    heldout: list[QaRow]


class Caption(NamedTuple):
    """How a comparison is presented.

    Attributes:
        name: the name of its files.
        title: the title of its sections.
        note: a sentence that says where the rows come from.
    """

    name: str
    title: str
    note: str


class Selection(NamedTuple):
    """Rows, and what is to become of them.

    Attributes:
        data: the rows that the model is trained on.
        forget: the rows among them to forget.
        retain: the rows among them to keep; 70 percent are seen by the edits, the others judge
            them.
        unseen: rows of the same kind that no model is trained on: with them `jedit.forget` ends the
            comparison, which stops by itself.
    """

    data: Sequence[QaRow]
    forget: Sequence[QaRow]
    retain: Sequence[QaRow]
    unseen: Sequence[QaRow] = ()


def question_answer(
    selection: Selection,
    caption: Caption,
    *,
    model: Model,
    recipe: Recipe,
    grid: Grid,
    seed: int,
    say: Say,
) -> tuple[Comparison, ...]:
    """Run the comparison at each of the recipe's lengths of training.

    Args:
        selection: the rows, those to forget and those to keep.
        caption: how the comparison is presented.
        model: size of the GPT.
        recipe: how the GPT is trained.
        grid: settings that the methods are tried at.
        seed: seed of everything random.
        say: a watcher, told of each stage.

    Returns:
        One comparison for each length of training.

    Raises:
        ValueError: the grid has a method that `served` refuses.
    """
    grid = served(grid, caption.name, has_unseen=bool(selection.unseen))
    key = jax.random.key(seed)
    keys = (jax.random.fold_in(key, i) for i in range(6))
    init_key, order_key, split_key, compare_key, sample_key, forget_key = keys
    sets = _split(selection, key=split_key)
    name, title, note = caption
    rows = _Rows(sets, model)
    vocab = rows.tokenizer.get_vocab_size()
    apply, initial = model.make(vocab, rows.width + ANSWER_TOKENS, key=init_key)
    say(f"{name}: training a GPT on {len(sets.data)} rows")
    originals = train(apply, initial, rows.encode(sets.data), recipe, key=order_key, say=say)
    say(f"{name}: retraining without the {len(sets.forget)} rows to forget")
    # From the same start and in the same order: what differs is then due to the rows alone.
    retraineds = train(apply, initial, rows.encode(sets.kept), recipe, key=order_key, say=say)
    found = []
    for original, retrained in zip(originals, retraineds, strict=True):
        start = time.perf_counter()
        is_one = len(originals) == 1
        part = name if is_one else f"{name}-{original.epochs}-epochs"
        task = Task(
            apply=apply,
            original=original.params,
            retrained=retrained.params,
            forget=rows.to_forget(sets.forget),
            retain=rows.encode(sets.seen),
            heldout=rows.encode(sets.heldout),
            test=rows.in_other_words(sets.heldout),
            truth_ratio=rows.truth_ratio_fn(apply, sets.forget),
            select=SELECT,
            chunk=32,
            probe=32,
            hidden_site=f"blocks/{model.layers - 1}/attn/query/kernel",
            layers=tuple(f"blocks/{i}/mlp/down/kernel" for i in range(model.layers)),
            refusals=rows.refusals(sets.forget),
            unknown=rows.to_forget(selection.unseen) if selection.unseen else None,
            alternates=functools.partial(
                rows.alternates, sets.forget, model, original.params, key=sample_key
            ),
            dialogue=functools.partial(rows.dialogue, sets.forget, sets.seen, model, grid),
        )
        judged, models = compare(task, grid, key=compare_key, say=Within(part, say))
        notes, run = _notes(sets, rows), None
        if selection.unseen:
            say(f"{part}: jedit.forget, until the rows cannot be told from unseen ones")
            unseen = rows.unseen(sets.forget, selection.unseen)
            run = run_by_itself(task, unseen, Judge(task, grid.lost_kl), key=forget_key)
            notes.append(f"jedit.forget: {run.sentence}")
        # Where no edit was good enough the page shows the untouched model as the edited one.
        edited = models[judged.chosen] if judged.chosen else original.params
        say(f"{part}: asking a few questions")
        asked = (original.params, edited, retrained.params, run and run.params)
        answers = rows.ask(apply, sets, asked)
        found.append(
            Comparison(
                name=part,
                title=title if is_one else f"{title}, after {original.epochs} epochs",
                notes=(note, *notes),
                num_rows={
                    "training": len(sets.data),
                    "forget": len(sets.forget),
                    "retain, seen by edits": len(sets.seen),
                    "retain, held out from edits": len(sets.heldout),
                },
                num_judged=judged.num_judged,
                settings={
                    "model": f"GPT, {model.layers} blocks of width {model.width}, {model.heads} "
                    f"heads, vocabulary {rows.tokenizer.get_vocab_size()}, "
                    f"rows of {rows.width} tokens, "
                    f"{sum(x.size for x in jax.tree.leaves(initial))} parameters",
                    "training": str(recipe),
                    "this model": f"after {original.epochs} epochs",
                    "K-FADE edits": f"parameters that match {SELECT}",
                    "curvatures": told(grid.factorize),
                    "rows of the line search": min(task.probe, len(sets.seen)),
                    "seed": seed,
                },
                seconds={
                    "train": original.seconds,
                    "retrain": retrained.seconds,
                    "fit, edit and judge": time.perf_counter() - start,
                },
                kl_budget=grid.kl_budget,
                original=judged.original,
                retrained=judged.retrained,
                methods=judged.methods,
                curves=judged.curves,
                answers=answers,
                by_itself=run and run.point,
            )
        )
    return tuple(found)


def served(grid: Grid, what: str, *, has_unseen: bool) -> Grid:
    """Return the grid with how its methods have the factors of curvatures kept, before any work.

    Args:
        grid: the methods, and how factors are asked to be kept.
        what: what the rows are of, for the message.
        has_unseen: whether there are rows of the same kind that no model is trained on.

    Raises:
        ValueError: a name that the catalogue does not have, or a method that needs what the rows do
            not give, or what factors are not to hold, or that the grid has no rates or scales for.
    """
    has = frozenset(Need) - (frozenset() if has_unseen else {Need.LATENTS})
    rows = check_methods(grid.methods, has, what)
    check_grid(grid, rows)
    return grid._replace(factorize=factorize_for(rows, grid.factorize))


class _Rows:
    """An encoder of rows, all to one width, so that the model compiles for one shape."""

    def __init__(self, sets: Sets, model: Model):
        self.tokenizer = train_tokenizer(text_of(sets.data), model.vocab)
        pairs = [(r.question, r.answer) for r in sets.data]
        self.perturbed = min((len(r.perturbed_answer) for r in sets.forget), default=0)
        self.has_ratio = self.perturbed > 0 and all(r.paraphrased_answer for r in sets.forget)
        if self.has_ratio:
            pairs += self._paraphrases(sets.forget) + self._wrong(sets.forget)
        self.has_other_words = all(r.paraphrased_question for r in sets.heldout)
        if self.has_other_words:
            pairs += self._other_words(sets.heldout)
        longest = encode_rows(self.tokenizer, pairs).inputs.shape[1] + 1
        self.max_len = min(longest, model.max_len)
        self.width = self.max_len - 1
        whole = np.asarray(encode_rows(self.tokenizer, sets.data).valid).sum(axis=1)
        self.num_cut = int(np.sum(whole > self.width))

    def encode(self, rows: Sequence[QaRow | tuple[str, str]]) -> Batch:
        return encode_rows(self.tokenizer, rows, self.max_len, truncate=True)

    def to_forget(self, rows: Sequence[QaRow]) -> Batch:
        """Encode rows of which only what their `forget_span` says is to be forgotten."""
        spans = [row.forget_span for row in rows]
        return encode_rows(self.tokenizer, rows, self.max_len, truncate=True, spans=spans)

    def _paraphrases(self, rows: Sequence[QaRow]) -> list[tuple[str, str]]:
        return [(r.question, r.paraphrased_answer or "") for r in rows]

    def _wrong(self, rows: Sequence[QaRow]) -> list[tuple[str, str]]:
        return [(r.question, wrong) for r in rows for wrong in r.perturbed_answer[: self.perturbed]]

    def _other_words(self, rows: Sequence[QaRow]) -> list[tuple[str, str]]:
        return [(r.paraphrased_question or "", r.answer) for r in rows]

    def refusals(self, rows: Sequence[QaRow]) -> Batch:
        """Return the questions with a refusal for an answer."""
        return self.encode([(r.question, REFUSAL) for r in rows])

    def alternates(
        self, rows: Sequence[QaRow], model: Model, params: PyTree, *, key: Array
    ) -> Batch:
        """Return the questions with what the model says to them, drawn until it is wrong."""
        stepper = gpt_stepper(num_layers=model.layers, num_heads=model.heads)
        prompts = prompts_of(self.encode(rows))

        def ask(key: Array, temperature: float) -> list[str]:
            given = (stepper, params, prompts, ANSWER_TOKENS)
            chunk = min(32, len(rows))
            tokens = sampled_tokens(*given, chunk=chunk, key=key, temperature=temperature)
            return decode_answers(self.tokenizer, tokens)

        return self.encode(sampled_alternates(rows, ask, key=key))

    def dialogue(
        self, forget: Sequence[QaRow], retain: Sequence[QaRow], model: Model, grid: Grid
    ) -> Dialogue:
        """Return what RULE is taught by and asks, at rates of the grid."""
        stepper = gpt_stepper(num_layers=model.layers, num_heads=model.heads)
        words = OwnWords(self.tokenizer)
        # Questions are not cut: a long one leaves less room for an answer.
        asked = words.prompts([(row.question, row.answer) for row in (*forget, *retain)])
        room = self.width + ANSWER_TOKENS + 1 - asked.tokens.shape[1]
        speaker = Speaker(stepper, words, self.encode, min(ANSWER_TOKENS, room))
        return dialogue(speaker, forget, retain, rates=grid.rates)

    def in_other_words(self, rows: Sequence[QaRow]) -> Batch | None:
        """Return the rows with their questions in other words, which no model was trained on."""
        return self.encode(self._other_words(rows)) if self.has_other_words else None

    def truth_ratio_fn(
        self, apply: Callable, rows: Sequence[QaRow]
    ) -> Callable[[PyTree], np.ndarray] | None:
        """Return a function from params to truth ratios by row, or None without wrong answers."""
        if not self.has_ratio:
            return None
        right = list(batches(self.encode(self._paraphrases(rows)), 32))
        wrong = list(batches(self.encode(self._wrong(rows)), 32))

        def ratios(params: PyTree) -> np.ndarray:
            wrong_nll = answer_nll_per_row(apply, params, wrong).reshape(-1, self.perturbed)
            return truth_ratio(answer_nll_per_row(apply, params, right), wrong_nll)

        return ratios

    def unseen(self, forget: Sequence[QaRow], unseen: Sequence[QaRow]) -> Unseen:
        """Return unseen rows, with wrong answers to both sets where all rows have some."""
        rows = self.to_forget(unseen)
        if any(row.forget_span for row in (*forget, *unseen)) or not all(
            len(row.perturbed_answer) >= self.perturbed > 0 for row in unseen
        ):
            return Unseen(rows)
        return Unseen(rows, *(self.encode(self._wrong(part)) for part in (forget, unseen)))

    def ask(
        self, apply: Callable, sets: Sets, models: Sequence[PyTree | None]
    ) -> tuple[Answer, ...]:
        """Ask three questions to forget and three held-out ones to keep; no model says nothing."""
        chosen = [("forget", sets.forget[i]) for i in spread(len(sets.forget), 3)]
        chosen += [("retain", sets.heldout[i]) for i in spread(len(sets.heldout), 3)]
        prompts = prompts_of(encode_rows(self.tokenizer, [row for _, row in chosen]))
        steps = ANSWER_TOKENS
        columns = []
        for params in models:
            if params is None:
                columns.append([""] * len(chosen))
                continue
            added = greedy_decode(
                apply, params, prompts.tokens, steps, prompt_lengths=prompts.lengths
            )
            columns.append(decode_answers(self.tokenizer, np.asarray(added)))
        return tuple(
            Answer(kind, row.question, row.answer, *texts)
            for (kind, row), *texts in zip(chosen, *columns, strict=True)
        )


def _split(selection: Selection, *, key: Array) -> Sets:
    data, forget, retain, _ = selection
    forgotten = {row.identity for row in forget}
    kept = [row for row in data if row.identity not in forgotten]
    order = np.asarray(jax.random.permutation(key, len(retain)))
    cut = min(max(1, round(SHARE_SEEN * len(order))), len(order) - 1)
    seen, heldout = ([retain[i] for i in part] for part in (order[:cut], order[cut:]))
    return Sets(list(data), list(forget), kept, seen, heldout)


def _notes(sets: Sets, rows: _Rows) -> list[str]:
    notes = [
        "The retrained model comes from the same recipe and the same initial parameters without "
        "the rows to forget. Outputs are the tokens of the answers. Retain rows are cut in two: "
        "curvature and edits see the first part, the held-out part judges them."
    ]
    if rows.has_other_words:
        notes.append("Test rows are the held-out retain facts, asked in other words.")
    if not rows.has_ratio:
        notes.append(
            "Truth ratio and Forget Quality are left out: they need a paraphrased_answer and a "
            "perturbed_answer on every row to forget."
        )
    if rows.num_cut:
        notes.append(
            f"{rows.num_cut} of {len(sets.data)} rows are longer than {rows.max_len} tokens and "
            "were cut off at the right."
        )
    return notes
