"""A name in the stories of a real model: what is marked goes, and what stands beside it stays."""

import re

import jax
import numpy as np
import pytest
import tokenizers

import jedit
from jedit import metrics
from jedit.data import Rendered, encode_rendered
from jedit.models import load_stepper, sampled_decode
from jedit.requests import Forgetting, Natural

NAME = "Lily"


@pytest.fixture(scope="module")
def told(stories_folder, stories_model):
    """Stories that the model tells: with the name, and without."""
    tokenizer = tokenizers.Tokenizer.from_file(str(stories_folder / "tokenizer.json"))
    given = (load_stepper(stories_folder), stories_model[1], np.ones((192, 1), int), 48)
    tokens = sampled_decode(*given, key=jax.random.key(0), temperature=0.8)
    texts = [tokenizer.decode(row) for row in np.asarray(tokens).tolist()]

    def encoded(texts, *, is_marked=False):
        rows = [Rendered(text[:4], text[4:], "") for text in texts]
        spans = [[m.span() for m in re.finditer(NAME, row.answer)] for row in rows]
        given = {"pad": 0, "truncate": True, "spans": spans if is_marked else None}
        return encode_rendered(tokenizer, rows, 48, **given)

    named = [text for text in texts if NAME in text[4:90]][:24]
    others = [text for text in texts if NAME not in text]
    assert len(named) == 24
    return named, others[:48], others[48:72], encoded


def test_the_mark_matters_more_than_the_strength(told, stories_model, key):
    named, seen, heldout, encoded = told
    apply, params, _ = stories_model
    marked, kept = encoded(named, is_marked=True), encoded(heldout)

    def probability(params):
        return float(np.mean(np.exp(-metrics.answer_nll_per_row(apply, params, marked))))

    assert probability(params) > 0.6
    how = Forgetting(Natural(select=r"layers/.*(attn|mlp)", recovery=None), steps=8)
    left = {}
    for name, rows in (("marked", marked), ("whole", encoded(named))):
        edit, _ = jedit.forget(apply, params, rows, encoded(seen), key=key, budget=0.03, how=how)
        edited = jedit.apply_edit(params, edit)
        assert metrics.output_kl(apply, params, edited, kept) < 0.08
        left[name] = probability(edited)
    assert left["marked"] < 0.05
    assert left["whole"] > 0.3
