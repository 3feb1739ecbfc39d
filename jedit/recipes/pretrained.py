"""A language model of one's own: make it forget rows, and save the edited folder."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.data import QaRow
from jedit.edits import apply_edit, cast_report
from jedit.models import load_model
from jedit.recipes.by_itself import cautions, how_it_went
from jedit.recipes.environment import machine, versions
from jedit.recipes.factorizing import factorize_for
from jedit.recipes.folders.choice import NATURAL, check_rows, check_settings, method_named
from jedit.recipes.folders.edits import make_edit
from jedit.recipes.folders.material import Given
from jedit.recipes.folders.places import edited_pattern
from jedit.recipes.folders.placing import cut, placed
from jedit.recipes.folders.settings import Settings
from jedit.recipes.folders.written import (
    EDITED,
    begin_job,
    end_job,
    forgotten_before,
    open_ledger,
    record,
    write,
)
from jedit.recipes.progress import Say
from jedit.recipes.tokenization import Words, load_words
from jedit.report import edit_page
from jedit.requests import Forgetting
from jedit.requests.unseen import check_power

SHARE_SEEN = 0.7
LEAST_RETAINED = 3  # one to see, one to price on, one to judge by


def forget_in_checkpoint(
    model: str | Path,
    tokenizer: str | Path,
    forget: Sequence[QaRow],
    retain: Sequence[QaRow],
    out: Path,
    settings: Settings,
    *,
    unseen: Sequence[QaRow] = (),
    say: Say,
) -> dict[str, Any]:
    """Load a folder, make it forget, judge, and save what came of it.

    `out` gets `edited`, the folder; `edit`, for `load_edit`; `results.json`; and `index.html`.
    While it works it holds `job`: the same call, after it was broken off, goes on from there. A
    ledger whose model has edits already is of the model with these, and gets one more.

    Rows are put into the tokenizer's chat template, or without one into "Question: ... Answer:
    ...". A part of the retain rows is seen by the edit, the rest judges it.

    Args:
        model: a Hugging Face folder; see `load_model`.
        tokenizer: folder of the model's tokenizer.
        forget: the rows to forget; of their answers what `forget_span` says.
        retain: the rows to keep, three at least. What an edit of the ledger has forgotten is left
            out of them.
        out: where the results go; those of an earlier run there are replaced.
        settings: how the edit is made.
        unseen: rows of the same kind that the model was not trained on: steps stop where the forget
            rows cannot be told from them; none: they stop at the budget, or the end.
        say: a watcher, told of each stage.

    Returns:
        The content of results.json.

    Raises:
        ValueError: a row that leaves no answer within `max_len`, a model or a tokenizer that
            cannot be loaded, too few rows for the method, settings that it would not look at,
            parameters to edit that are not there, a ledger of another model or one that was
            changed meanwhile, or the job of another call.
        TimeoutError: another process is at the same job, or writes into the ledger.
        FloatingPointError: the steps left the finite numbers.
    """
    if unseen and any(r.forget_span for r in forget) != any(r.forget_span for r in unseen):
        raise ValueError(
            "rows to forget and unseen rows are compared by what counts of them: give forget_span "
            "in both, or in none"
        )
    row = method_named(settings.method)
    check_settings(row, settings.given())
    factorize_for([row], settings.factorize)  # refuses, before any work
    check_rows(row, unseen)
    _check_retained(len(retain))
    if unseen:
        check_power(len(forget), len(unseen), Forgetting.significance)
    settings = settings._replace(method=NATURAL if row is None else row.name)
    split_key, edit_key = jax.random.split(jax.random.key(settings.seed))
    say(f"loading {model}")
    apply, params, config = load_model(model, mesh=settings.mesh)
    select = edited_pattern(params, settings.select, settings.layers)
    ledger, head, earlier = open_ledger(settings.ledger, params), None, {}
    if ledger is not None:
        head = ledger.head  # first: what is recorded from now on is found to be too much
        params = ledger.params(params)
        is_gone = forgotten_before(ledger, retain)
        number = sum(entry.is_active for entry in ledger.entries)
        earlier = {"ledger": {"edits_before": number, "rows_left_out": sum(is_gone)}}
        if any(is_gone):
            # An edit would teach them again, and its price would count them as kept.
            say(f"leaving out {sum(is_gone)} rows to keep that earlier edits have forgotten")
            retain = [x for x, gone in zip(retain, is_gone, strict=True) if not gone]
            _check_retained(len(retain))
    words = load_words(tokenizer)
    encode = _encoder(words, settings.max_len)
    order = np.asarray(jax.random.permutation(split_key, len(retain)))
    share = min(max(1, round(SHARE_SEEN * len(order))), len(order) - 1)
    rows = {
        "forget": list(forget),
        "retain": [retain[i] for i in order[:share]],
        "heldout": [retain[i] for i in order[share:]],
    } | ({"unseen": list(unseen)} if unseen else {})
    whole, num_cut = {}, {}
    for name, part in rows.items():
        encoded, num_cut[name] = encode(part, name in ("forget", "unseen"))
        whole[name] = placed(encoded, settings.mesh)
    judged = {name: cut(whole[name], settings) for name in ("forget", "heldout")}
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        job, goes_on = None, False
        if settings.is_resumable:
            asked = settings.to_json() | {"model": str(model), "tokenizer": str(tokenizer)}
            job, goes_on = begin_job(out, asked, rows)
            stack.callback(job.close)
            if goes_on:
                say(f"going on with {job.folder}, which was broken off")
        given = Given(
            apply,
            params,
            Path(model),
            words,
            config.max_position_embeddings,
            list(forget),
            rows["retain"],
            whole,
            lambda pairs: placed(encode([QaRow(*x) for x in pairs], False)[0], settings.mesh),
            select,
            say,
            job,
            edit_key,
        )
        try:
            edit, found = make_edit(row, given, settings)
        except (ValueError, FloatingPointError):
            # What a method refuses it would refuse again: the next command begins anew.
            if job is not None and not goes_on:
                end_job(job)
            raise
        # Waited for: dispatch is asynchronous and the clock would stop before the work does.
        edited = jax.block_until_ready(apply_edit(params, edit))
        made = time.perf_counter()
        say("judging")
        lost = cast_report(params, edit)
        result = {
            "settings": settings.to_json(),
            "num_rows": {name: len(part) for name, part in rows.items()},
            "num_cut_off": num_cut,
            "before": judge(apply, params, params, judged),
            "after": judge(apply, params, edited, judged),
            **found,
            **earlier,
            "rounded_away": max((float(x.rounded_away) for x in lost.values()), default=0.0),
            "seconds": {"fit, edit and attack": made - start},
            "machine": machine(),
            "versions": versions(),
        }
        texts = [how_it_went(result), *cautions(result, settings.budget)]
        page = edit_page(result, [text for text in texts if text])
        say(f"saving {out / EDITED}")
        write(out, edited, edit, result, page, source=model)
        if settings.ledger is not None:
            try:
                number = record(settings.ledger, params, edit, forget, result, head=head)
            except ValueError:
                if job is not None:  # it is of the ledger as it was
                    end_job(job)
                raise
            result["ledger_entry"] = number
        if job is not None:
            end_job(job)
    return result


def judge(
    apply: Callable, original: PyTree, params: PyTree, sets: dict[str, list[Batch]]
) -> dict[str, float]:
    """Measure what is known of the forget and held-out rows, and how far held-out outputs moved."""
    loss = metrics.answer_nll_per_row(apply, params, sets["forget"])
    memorized = metrics.exact_memorization(apply, params, sets["forget"])
    extracted = metrics.extraction_strength(apply, params, sets["forget"])
    return {
        "forget_nll": metrics.nll(apply, params, sets["forget"]),
        "forget_probability": float(np.mean(metrics.answer_probability(loss))),
        "forget_exact_memorization": float(np.mean(memorized)),
        "forget_extraction_strength": float(np.mean(extracted)),
        "heldout_nll": metrics.nll(apply, params, sets["heldout"]),
        "heldout_kl": metrics.output_kl(apply, original, params, sets["heldout"]),
    }


def _check_retained(number: int) -> None:
    if number < LEAST_RETAINED:
        raise ValueError(
            f"{number} rows to keep; at least {LEAST_RETAINED} are needed, one for the edit to "
            "see, one to price it on and one to judge it by"
        )


def _encoder(words: Words, max_len: int) -> Callable[[Sequence[QaRow], bool], tuple[Batch, int]]:
    def encode(rows: Sequence[QaRow], is_forget: bool) -> tuple[Batch, int]:
        pairs = [(row.question, row.answer) for row in rows]
        spans = [row.forget_span for row in rows] if is_forget else None
        encoded = words.rows(pairs, spans=spans)
        width = min(encoded.inputs.shape[1], max_len - 1)
        num_cut = int(np.sum(np.asarray(encoded.valid)[:, width:].any(axis=1)))
        cut = jax.tree.map(lambda array: array[:, :width], encoded)
        if np.any(is_cut := np.asarray(cut.mask).sum(axis=1) == 0):
            row = rows[int(np.argmax(is_cut))]
            what = "nothing of forget_span is" if is_forget and row.forget_span else "no answer is"
            raise ValueError(
                f"{row.where}: {what} among the first {max_len} tokens; give a larger --max-len"
            )
        return cut, num_cut

    return encode
