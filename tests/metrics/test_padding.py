"""A transformer's rows score the same alone, in company and padded to the right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit import metrics
from jedit.core.batch import Batch
from jedit.models import gpt

VOCAB, PROMPT = 7, 1
# Which tokens of each row are the model's own choice, the first of them still in the prompt.
IS_OWN = ((0, 1, 0), (0, 1, 0, 1, 1), (1, 0, 0, 0, 0), (1, 0, 1), (0, 1, 1, 1, 1))
PER_ROW = {
    name: getattr(metrics, name)
    for name in (
        "answer_nll_per_row",
        "answer_nll_sum_per_row",
        "exact_memorization",
        "extraction_strength",
        "min_k_scores",
        "min_k_plus_plus_scores",
        "gradient_norm_scores",
    )
}


@pytest.fixture(scope="module")
def model():
    """Apply and params; grown, so that what it predicts depends on what stands before."""
    sizes = {"vocab": VOCAB, "width": 8, "num_layers": 1, "num_heads": 2, "max_len": 9}
    apply, params = gpt(key=jax.random.key(1), dtype=jnp.zeros(()).dtype, **sizes)
    return apply, jax.tree.map(lambda x: 8 * x if x.ndim == 2 and len(x) == VOCAB else x, params)


@pytest.fixture(scope="module")
def rows(model):
    """Token sequences, of which some tokens are the model's choice and some just are not."""
    apply, params = model
    choose = jax.jit(lambda tokens: jnp.argmax(apply(params, tokens[None])[0], axis=-1))
    rows = []
    for n, is_own in enumerate(IS_OWN):
        tokens = np.full(6, n)
        for s, own in enumerate(is_own):
            tokens[s + 1] = (choose(jnp.asarray(tokens))[s] + 1 - own) % VOCAB
        rows.append(tokens[: len(is_own) + 1])
    return rows


def batch(rows, width, num_rows):
    """Answers after a prompt; what fills up rows and batch is garbage, and counts nothing."""
    inputs, targets = np.full((2, num_rows, width), VOCAB - 2)
    mask = np.zeros((num_rows, width), bool)
    for n, tokens in enumerate(rows):
        inputs[n, : len(tokens) - 1] = tokens[:-1]
        targets[n, : len(tokens) - 1] = tokens[1:]
        mask[n, PROMPT : len(tokens) - 1] = True
    return Batch(jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(mask))


@pytest.mark.parametrize("name", PER_ROW)
def test_padding_and_company_change_nothing(model, rows, name, tolerance):
    score = PER_ROW[name]
    alone = np.concatenate([score(*model, batch([row], len(row) - 1, 1)) for row in rows])
    assert len(set(np.round(alone, 6))) >= 3
    padded = [batch(rows[:3], 9, 3), batch(rows[3:], 9, 3)]
    tolerance.check(score(*model, padded), alone)
