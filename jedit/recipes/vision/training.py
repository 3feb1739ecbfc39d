"""How the models of the vision protocol are trained, and where they are kept.

SGD with momentum and weight decay, its rate a tenth from half of the epochs on and a hundredth from
three quarters on: 0.1, 0.9, 5e-4, batches of 256 and 182 epochs in the code of Jia et al. (arXiv
2304.04934), which SalUn's is built on.
"""

import dataclasses
import functools
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit.checkpoint.disk import temporary_name
from jedit.core.batch import Batch
from jedit.core.paths import leaves_with_paths
from jedit.objectives import RetainNLL
from jedit.recipes.fitting import rows_of
from jedit.recipes.progress import Say, tell
from jedit.training import LoopState, Watch, fit

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
DECAY = (0.5, 0.75)  # of the epochs; the code's 91 and 136 of 182
MARGIN = 4  # pixels of a crop; the code's


class Recipe(NamedTuple):
    """Settings of a training by SGD with momentum 0.9 and weight decay 5e-4.

    Attributes:
        epochs: passes over the rows.
        batch_size: rows of a step; an epoch is as many steps as there are whole batches.
        learning_rate: of the first half.
        augmented: whether images are cropped at random and half of them mirrored, anew in each
            epoch.
    """

    epochs: int = 182
    batch_size: int = 256
    learning_rate: float = 0.1
    augmented: bool = True


def train_classifier(
    apply: Callable,
    params: PyTree,
    rows: Batch,
    recipe: Recipe,
    *,
    key: Array,
    say: Say,
) -> PyTree:
    """Train by the recipe.

    Args:
        apply: `apply(params, images) -> logits`.
        params: the parameters to begin with.
        rows: the rows to train on.
        recipe: how long, in which batches and at which rate.
        key: of the order of the rows, and of the crops.
        say: a watcher, told after each epoch how far the training is.

    Returns:
        The trained parameters.

    Raises:
        FloatingPointError: the rate was too large.
    """
    order_key, crop_key = jax.random.split(key)
    size = min(recipe.batch_size, rows_of(rows))
    steps = rows_of(rows) // size
    optimizer = _optimizer(recipe.learning_rate, recipe.epochs * steps)
    state = LoopState(0, params, optimizer.init(params))
    for epoch in range(recipe.epochs):
        seen = rows
        if recipe.augmented:
            seen = rows._replace(
                inputs=augment(rows.inputs, key=jax.random.fold_in(crop_key, epoch))
            )
        last: list[LoopState] = []
        fit(
            _Loss(apply),
            optimizer,
            state,
            seen,
            epochs=(epoch + 1) * steps * size / rows_of(rows),  # whole batches alone
            key=jax.random.clone(order_key),  # each epoch goes on in the same order of all
            batch_size=size,
            watch=Watch(lambda state, _, last=last: last.append(_copied(state)), every=steps),
        )
        state = last[-1]
        tell(say, epoch + 1, recipe.epochs)
    return state.params


def _copied(state: LoopState) -> LoopState:
    """Return a copy, since the loop's next step writes into this memory."""
    return state._replace(
        params=jax.tree.map(jnp.copy, state.params),
        optimizer_state=jax.tree.map(jnp.copy, state.optimizer_state),
    )


@jax.jit
def augment(images: Array, *, key: Array) -> Array:
    """Move every image by up to 4 pixels either way, black coming in, and mirror half of them."""
    height, width = images.shape[1:3]
    move_key, mirror_key = jax.random.split(key)
    starts = jax.random.randint(move_key, (len(images), 2), 0, 2 * MARGIN + 1)
    padded = jnp.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))

    def cut(image, start):
        shape = (height, width, image.shape[-1])
        return jax.lax.dynamic_slice(image, (start[0], start[1], jnp.zeros_like(start[0])), shape)

    moved = jax.vmap(cut)(padded, starts)
    is_mirrored = jax.random.bernoulli(mirror_key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(is_mirrored, moved[:, :, ::-1], moved)


def kept_params(
    file: Path, like: PyTree, about: Mapping[str, Any], make: Callable[[], PyTree]
) -> tuple[PyTree, float]:
    """Return the parameters of a file, or make them and write the file, and the seconds they took.

    Args:
        file: where they are kept, or are to be.
        like: parameters of the same shapes.
        about: what they are made of, as JSON can hold it.
        make: makes them.

    Raises:
        ValueError: the file is no such file, or of something else.
    """
    paths = dict(leaves_with_paths(like))
    if file.exists():
        arrays, text = _read(file)
        theirs = {name: (x.shape, x.dtype) for name, x in arrays.items()}
        if theirs != {name: (x.shape, x.dtype) for name, x in paths.items()}:
            raise ValueError(f"{file}: holds no parameters of this model; remove it")
        if text.get("about") != json.loads(json.dumps(about)):
            raise ValueError(
                f"{file}: was trained otherwise; give another --out, or remove it, and the model "
                "is trained again"
            )
        leaves = [jnp.asarray(arrays[name]) for name in paths]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), float(text["seconds"])
    start = time.perf_counter()
    params = jax.block_until_ready(make())
    seconds = time.perf_counter() - start
    text = json.dumps({"about": about, "seconds": seconds})
    file.parent.mkdir(parents=True, exist_ok=True)
    new = temporary_name(file.parent)
    with new.open("wb") as content:
        arrays = {name: np.asarray(x) for name, x in leaves_with_paths(params)}
        np.savez(content, **{**arrays, ABOUT: np.array(text)})  # type: ignore[arg-type]
    new.replace(file)
    return params, seconds


ABOUT = "about.json"


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays of a file and what it says of them.

    Raises:
        ValueError: the file is something else.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        text = json.loads(str(arrays.pop(ABOUT)))
        float(text["seconds"])
    except (  # the last are what zipfile raises of a damaged archive
        *(OSError, ValueError, KeyError, TypeError, EOFError, RecursionError),
        *(zipfile.BadZipFile, zlib.error, NotImplementedError),
    ):
        raise ValueError(
            f"{file}: is no model that a run has written; remove it, and it is trained again"
        ) from None
    return arrays, text


@functools.cache
def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    falls = {round(share * steps): 0.1 for share in DECAY}
    schedule = optax.piecewise_constant_schedule(learning_rate, falls)
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(schedule, momentum=MOMENTUM)
    )


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of one model, equal by value, so that a second training compiles nothing anew."""

    apply: Callable

    def __call__(self, params: PyTree, rows: Batch) -> tuple[Array, dict[str, Array]]:
        return RetainNLL()(self.apply, params, None, rows)
