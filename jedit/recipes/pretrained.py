"""A language model of one's own: make it forget rows, and save the edited folder."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import QaRow, batches
from jedit.edits import Edit, apply_edit, cast_report
from jedit.methods import Ascent, kfade
from jedit.models import cast_params, load_model, mixed_precision, save_model
from jedit.recipes.by_itself import found_of
from jedit.recipes.progress import Say
from jedit.recipes.tokenization import Words, load_words
from jedit.requests import Forgetting, Natural, Recovery, Rewind, Unseen
from jedit.requests import forget as forget_rows

# The matrices of the blocks: what an embedding or a norm has learned serves every row.
SELECT = r"^layers/\d+/(attn|mlp)/"
SHARE_SEEN = 0.7
KFADE_BUDGET, KFADE_DAMPING = 0.05, 0.1
ATTACK_RATE = 1e-5  # of Adam: what open-unlearning trains TOFU's models with
REWIND_RATE = 2 * ATTACK_RATE
EDITED, RESULTS = "edited", "results.json"


class Settings(NamedTuple):
    """Settings of the edit of a model folder.

    Attributes:
        method: "natural", steps that stop by themselves (`jedit.forget`), or "kfade", one step in
            closed form.
        budget: retain KL that the edit may cost, nats per answer token; None: 0.05 for K-FADE,
            whatever it takes for natural steps.
        temperature: of the likelihood in whose curvature it steps; None: 1 for K-FADE, for natural
            steps the one of `choose_temperature`.
        steps: number of natural steps at most.
        recovery: number of steps after them that bring back what they cost; 0: none.
        base: folder of the model before it learned the rows, towards which the weights are drawn
            back first; None: natural steps begin at the model.
        rewind: number of steps that train on from there, best two fifths of retraining's.
        rewind_rate: Adam's learning rate in them; 2e-5 is twice what TOFU's models are trained by.
        attack: whether the rows are taught again after natural steps, to see what comes back.
        max_len: number of tokens of a row, at most; longer rows are cut off.
        batch_size: number of rows of a step, and evaluated at a time.
        seed: seed of the split of the retain rows, of the steps and of the curvature's labels.
    """

    method: Literal["natural", "kfade"] = "natural"
    budget: float | None = None
    temperature: float | None = None
    steps: int = 48
    recovery: int = 48
    base: Path | None = None
    rewind: int = 100
    rewind_rate: float = REWIND_RATE
    attack: bool = True
    max_len: int = 256
    batch_size: int = 8
    seed: int = 0


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
    """Load a folder, make it forget, judge, and save `out/edited` beside `out/results.json`.

    Rows are put into the tokenizer's chat template, or without one into "Question: ... Answer:
    ...". A part of the retain rows is seen by the edit, the rest judges it.

    Args:
        model: a Hugging Face folder; see `load_model`.
        tokenizer: folder of the model's tokenizer.
        forget: the rows to forget; of their answers what `forget_span` says.
        retain: the rows to keep, two at least.
        out: where the results go; those of an earlier run there are replaced.
        settings: how the edit is made.
        unseen: rows of the same kind that the model was not trained on: natural steps stop where
            the forget rows cannot be told from them; none: they stop at the budget, or the end.
        say: a watcher, told of each stage.

    Returns:
        The content of results.json.

    Raises:
        ValueError: a row that leaves no answer within `max_len`, a model or a tokenizer that
            cannot be loaded, or too few rows for the method.
    """
    if unseen and any(r.forget_span for r in forget) != any(r.forget_span for r in unseen):
        raise ValueError(
            "rows to forget and unseen rows are compared by what counts of them: give forget_span "
            "in both, or in none"
        )
    split_key, edit_key = jax.random.split(jax.random.key(settings.seed))
    say(f"loading {model}")
    apply, params, _ = load_model(model)
    encode = _encoder(load_words(tokenizer), settings.max_len)
    order = np.asarray(jax.random.permutation(split_key, len(retain)))
    cut = min(max(1, round(SHARE_SEEN * len(order))), len(order) - 1)
    rows = {
        "forget": list(forget),
        "retain": [retain[i] for i in order[:cut]],
        "heldout": [retain[i] for i in order[cut:]],
    }
    whole, num_cut = {}, {}
    for name, part in (rows | ({"unseen": list(unseen)} if unseen else {})).items():
        whole[name], num_cut[name] = encode(part, name in ("forget", "unseen"))
    sets = {
        name: list(batches(whole[name], min(settings.batch_size, len(part))))
        for name, part in rows.items()
    }
    start = time.perf_counter()
    if settings.method == "natural":
        edit, found = _naturally(apply, params, whole, settings, say=say, key=edit_key)
    elif settings.method == "kfade":
        edit, found = _by_kfade(apply, params, sets, settings, say=say, key=edit_key)
    else:
        raise ValueError(f'method must be "natural" or "kfade", got {settings.method!r}')
    # Waited for, since dispatch is asynchronous and the clock would stop before the work does.
    edited = jax.block_until_ready(apply_edit(params, edit))
    made = time.perf_counter()
    say("judging")
    lost = cast_report(params, edit)
    result = {
        "settings": settings._asdict() | {"base": settings.base and str(settings.base)},
        "num_rows": {name: len(part) for name, part in rows.items()},
        "num_cut_off": num_cut,
        "before": judge(apply, params, params, sets),
        "after": judge(apply, params, edited, sets),
        **found,
        "rounded_away": max((float(x.rounded_away) for x in lost.values()), default=0.0),
        "seconds": {"fit, edit and attack": made - start},
    }
    say(f"saving {out / EDITED}")
    out.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".edited.", dir=out))
    try:
        saved = save_model(edited, new / EDITED, source=model)
        # An earlier edited model goes only when the new one is whole.
        if (out / EDITED).exists():
            (out / EDITED).rename(new / "old")
        saved.rename(out / EDITED)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    text = json.dumps(_finite(result), indent=1, allow_nan=False)
    (out / RESULTS).write_text(text + "\n", encoding="utf-8")
    return result


def _by_kfade(
    apply: Callable,
    params: PyTree,
    sets: dict[str, list[Batch]],
    settings: Settings,
    *,
    say: Say,
    key: Array,
) -> tuple[Edit, dict[str, Any]]:
    """Edit in one step in closed form."""
    say("fitting K-FAC on the retain rows")
    temperature = 1.0 if settings.temperature is None else settings.temperature
    estimator = kfac(apply, Categorical(temperature), select=SELECT)
    curvature = jax.block_until_ready(estimate(estimator, params, sets["retain"], key=key))
    say("forgetting by K-FADE")
    edit, info = kfade(
        apply,
        params,
        curvature,
        sets["forget"],
        sets["retain"],
        budget=KFADE_BUDGET if settings.budget is None else settings.budget,
        damping=KFADE_DAMPING,
        ascent=Ascent(1),
    )
    price = {"predicted_kl": float(info.predicted_kl[-1]), "true_kl": float(info.true_kl[-1])}
    return edit, price


def _naturally(
    apply: Callable,
    params: PyTree,
    whole: dict[str, Batch],
    settings: Settings,
    *,
    say: Say,
    key: Array,
) -> tuple[Edit, dict[str, Any]]:
    """Edit by natural steps that stop by themselves."""
    forget, unseen = whole["forget"], whole.get("unseen")
    rewind, before = None, ""
    if settings.base is not None:
        say(f"loading {settings.base}")
        start = load_model(settings.base)[1]
        narrow = jax.tree.leaves(params)[0].dtype
        wide = jnp.promote_types(narrow, jnp.float32)
        if wide != narrow:  # small steps add up in float32 alone
            apply, params = mixed_precision(apply, narrow), cast_params(params, wide)
        rewind = Rewind(
            cast_params(start, wide),
            settings.rewind_rate,
            settings.rewind,
            batch_size=settings.batch_size,
        )
        before = f"{settings.rewind} steps from a part of the way back, "
    say(f"{before}fitting K-FAC on the retain rows, then at most {settings.steps} natural steps")
    likelihood = None if settings.temperature is None else Categorical(settings.temperature)
    can_attack = settings.attack and len(forget.inputs) > 1  # some are taught, others asked about
    recovery = None
    if settings.recovery:
        recovery = Recovery(settings.recovery, batch_size=settings.batch_size)
    how = Forgetting(
        Natural(
            select=SELECT,
            batch_size=settings.batch_size,
            recovery=recovery,
            rewind=rewind,
        ),
        likelihood=likelihood,
        steps=settings.steps,
        attack=optax.adam(ATTACK_RATE) if can_attack else None,
    )
    edit, info = forget_rows(
        apply,
        params,
        forget,
        whole["retain"],
        unseen=None if unseen is None else Unseen(unseen),
        budget=settings.budget,
        key=key,
        how=how,
    )
    return edit, found_of(info)


def check_folder(out: Path, *sources: Path) -> None:
    """Refuse a folder that holds what no run of this kind has written, or what is to be read.

    Args:
        out: the folder into which the results are to go.
        sources: folders of the model and its tokenizer.

    Raises:
        ValueError: `out` is a file, has other things in it, or would replace a source.
    """
    for source in sources:
        if source.resolve().is_relative_to((out / EDITED).resolve()):
            raise ValueError(
                f"{source}: would be replaced by the edited model; give another --out to edit it "
                "once more"
            )
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; --out names a folder")
    if out.is_dir():
        foreign = sorted({item.name for item in out.iterdir()} - {EDITED, RESULTS})
        if foreign:
            raise ValueError(
                f"{out}: holds files that no such run has written ({', '.join(foreign[:3])}); give "
                "another --out, or empty the folder"
            )


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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
