"""The models that TOFU is run on: a GPT made and trained here, or a folder of the user's own."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jedit.core.paths import parameter_paths
from jedit.data import text_of, train_tokenizer
from jedit.models import (
    Stepper,
    cast_params,
    gpt_stepper,
    load_model,
    load_stepper,
    mixed_precision,
)
from jedit.recipes.folders import places
from jedit.recipes.scenes.question_answer import SELECT, Model
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tokenization import OwnWords, load_words

ANSWER_TOKENS = 64  # positions beyond the longest row, for answers that go on


class Pretrained(NamedTuple):
    """Settings by which the model of a folder is run.

    Attributes:
        max_len: number of tokens of a row, at most; longer rows are cut off.
        chunk: number of rows evaluated at a time.
    """

    max_len: int
    chunk: int


class Start(NamedTuple):
    """A model before anything is learned or forgotten, with the places that methods edit.

    Attributes:
        model: the language model's functions and words.
        params: the parameters, in float32 or wider, whatever the model computes in.
        retrained: the parameters of the model that never learned the forget rows; None: both are
            still to learn the rows, from `params`.
        select: regular expression of the parameters that K-FADE edits.
        hidden_site: name of the site whose input is the hidden state of RMU and of the probe.
        layers: paths of the matrices that AlphaEdit and MEMIT edit, by depth.
        stream: by depth, the sites that write into the residual stream, as `depth_score` takes
            them; empty: how deep an answer is erased is not measured.
        description: a sentence that says what the model is.
    """

    model: LanguageModel
    params: PyTree
    retrained: PyTree | None
    select: str
    hidden_site: str
    layers: tuple[str, ...]
    stream: tuple[tuple[str, ...], ...]
    description: str


def small_gpt(rows: list, size: Model, dtype: DTypeLike, *, key: Array) -> Start:
    """Make a GPT that has learned nothing, and a tokenizer trained on the rows."""
    tokenizer = train_tokenizer(text_of(rows), size.vocab)
    num_positions = size.max_len + ANSWER_TOKENS
    vocab = tokenizer.get_vocab_size()
    apply, stepper = _functions(vocab, size, jnp.dtype(dtype))
    _, params = size.make(vocab, num_positions, key=key)
    return Start(
        model=LanguageModel(
            apply,
            stepper,
            OwnWords(tokenizer),
            size.max_len,
            num_positions,
            dtype=dtype,
        ),
        params=params,
        retrained=None,
        select=SELECT,
        hidden_site=f"blocks/{size.layers - 1}/attn/query/kernel",
        layers=tuple(f"blocks/{i}/mlp/down/kernel" for i in range(size.layers)),
        stream=tuple(
            (*begin, f"blocks/{i}/attn/out/kernel", f"blocks/{i}/mlp/down/kernel")
            for i, begin in enumerate([("positions",)] + [()] * (size.layers - 1))
        ),
        description=f"GPT, {size}, {_size(params)} parameters",
    )


@functools.cache
def _functions(vocab: int, size: Model, dtype: jnp.dtype) -> tuple[Callable, Stepper]:
    """Return the same objects for the same model, so that a second one compiles nothing."""
    apply, _ = size.make(vocab, size.max_len + ANSWER_TOKENS, key=jax.random.key(0))
    apply = apply if dtype == jnp.float32 else mixed_precision(apply, dtype)
    return apply, gpt_stepper(num_layers=size.layers, num_heads=size.heads)


def from_folders(
    folder: Path,
    retrained: Path | None,
    tokenizer: Path | None,
    settings: Pretrained,
    dtype: DTypeLike,
) -> Start:
    """Load a model that knows the rows and one that does not, or one that is to learn them.

    Weights are read in `dtype`, in which everything is computed, and kept in float32 (or wider), so
    that training and edits add up in them.

    Args:
        folder: folder of the model; see `load_model`.
        retrained: folder of the model retrained without the forget rows; None: there is none.
        tokenizer: folder of the tokenizer; None: the model's.
        settings: how the model is run.
        dtype: dtype of the computation.

    Raises:
        ValueError: something cannot be loaded, or the two are not of one shape.
    """
    words = load_words(tokenizer or folder)
    apply, narrow, config = load_model(folder, dtype=dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    params, other = cast_params(narrow, wide), None
    if retrained is not None:
        other = cast_params(load_model(retrained, dtype=dtype)[1], wide)
        # Both run by the functions of the first: with other shapes they would fail deep inside, or
        # not.
        if (ours := _shapes(params)) != (theirs := _shapes(other)):
            differing = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
            raise ValueError(
                f"{retrained} is not the same model as {folder}: they differ in "
                f"{', '.join(differing[:3])}; --retrained is the same one, trained on other rows."
            )
    return Start(
        model=LanguageModel(
            apply if wide == jnp.dtype(dtype) else mixed_precision(apply, dtype),
            load_stepper(folder, dtype=dtype),
            words,
            min(settings.max_len, config.max_position_embeddings),
            config.max_position_embeddings,
            settings.chunk,
            dtype,
        ),
        params=params,
        retrained=other,
        select=places.SELECT,
        hidden_site=places.hidden_site(params),
        layers=places.written_layers(params),
        # Which of these models norm what a layer writes before it is added is not known here.
        stream=(),
        description=f"{config.model_type} of {folder}, {_size(params)} parameters, computed in "
        f"{jnp.dtype(dtype).name}",
    )


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in parameter_paths(params)}


def _size(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
