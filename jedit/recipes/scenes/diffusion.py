"""The diffusion scene: a small denoiser learns digits, some of them by heart.

Prompt 0 is the empty one, 1 to 10 are the digits 0 to 9, each with many images, and every prompt
from 11 on has one image, which the training data hold in many copies: these are memorised.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.curvature import Curvature, Factorize, estimate, kfac
from jedit.curvature.likelihoods import Gaussian
from jedit.data import Images, load_digits, split_digits
from jedit.metrics import frechet_distance, memorised_samples
from jedit.models import cnn, cosine_schedule, denoise, denoiser, noised, visited_inputs
from jedit.recipes.fitting import Recipe, train
from jedit.recipes.progress import Say, ignore

NUM_CLASSES, NUM_PIXELS = 10, 64
FIRST = NUM_CLASSES + 1  # the first memorised prompt
FEED_FORWARD = r"blocks/\d+/ffn"
RECIPE = Recipe((15,), batch_size=64, learning_rate=2e-3)  # of the classifier that judges


class Size(NamedTuple):
    """How large the scene is.

    Attributes:
        memorised: number of prompts with one image each.
        copies: how often the training data hold each of these images.
        width: width of the denoiser.
        layers: number of its blocks.
        steps: number of training steps.
        batch_size: images in a step.
        learning_rate: Adam's, at the start; it falls to zero by half a cosine.
        noise_steps: T, number of steps of the schedule.
        dropped: share of the digits' images whose prompt is replaced by the empty one.
    """

    memorised: int = 16
    copies: int = 20
    width: int = 128
    layers: int = 3
    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 2e-3
    noise_steps: int = 100
    dropped: float = 0.1


class Room(NamedTuple):
    """A trained denoiser, and what judges it.

    Attributes:
        apply: `apply(params, NoisedImages) -> noise`.
        original: trained on everything.
        schedule: the shares of the signal by step.
        memorised: (prompts, pixels) the image of each memorised prompt, in [-1, 1].
        images: (n, pixels) all other training images.
        labels: their digits.
        test: images that no model was trained on.
        retrain: makes the parameters trained without the memorised prompts.
        classify: images (n, pixels) to logits.
    """

    apply: Callable
    original: PyTree
    schedule: np.ndarray
    memorised: Float[Array, "prompts pixels"]
    images: Float[Array, "n pixels"]
    labels: np.ndarray
    test: Float[Array, "m pixels"]
    retrain: Callable[[], PyTree]
    classify: Callable[[Array], Array]


def room(seed: int, size: Size = Size(), say: Say = ignore) -> Room:  # noqa: B008 - a tuple
    """Train the classifier and the denoiser of one seed."""
    make, order, judge = (jax.random.fold_in(jax.random.key(seed), i) for i in range(3))
    general_rows, test = split_digits(load_digits(), seed=seed)
    # The memorised images are of the test part, so that no class prompt has them.
    one_each, test = _split(test, size.memorised)
    schedule = cosine_schedule(size.noise_steps)
    apply, initial = _model(size, make)
    memorised, images = (_pixels(part) for part in (one_each, general_rows))
    general = jnp.asarray(general_rows.labels, jnp.int32) + 1
    prompts = FIRST + jnp.arange(size.memorised, dtype=jnp.int32)

    def fit(with_memorised: bool) -> PyTree:
        rows, asked = images, general
        if with_memorised:
            rows = jnp.concatenate([rows, jnp.repeat(memorised, size.copies, 0)])
            asked = jnp.concatenate([asked, jnp.repeat(prompts, size.copies)])
        return train_denoiser(apply, initial, rows, asked, size, schedule, key=order)

    say("training the classifier that judges")
    classifier, untrained = cnn(key=judge)
    trained = train(classifier, untrained, general_rows.as_batch(), RECIPE, key=order)[0].params
    say(f"training the denoiser, {size.memorised} images by heart")
    return Room(
        apply,
        fit(True),
        schedule,
        memorised,
        images,
        general_rows.labels,
        _pixels(test),
        functools.partial(fit, False),
        functools.partial(_classified, classifier, trained),
    )


def train_denoiser(
    apply: Callable,
    params: PyTree,
    images: Float[Array, "n pixels"],
    prompts: Array,
    size: Size,
    schedule: np.ndarray,
    *,
    key: Array,
) -> PyTree:
    """Train on fresh noise in every step, by Adam; `fit` would draw the noise once.

    The empty prompt stands in for a digit's, never for a memorised one: it says what the model does
    where nothing is asked for, and is what memorised prompts are compared with.
    """
    rate = optax.cosine_decay_schedule(size.learning_rate, size.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    @jax.jit
    def run(params, images, prompts):
        def step(carry, index):
            params, state = carry
            row_key, noise_key, drop_key = jax.random.split(jax.random.fold_in(key, index), 3)
            rows = jax.random.randint(row_key, (size.batch_size,), 0, len(images))
            is_dropped = jax.random.uniform(drop_key, rows.shape) < size.dropped
            asked = prompts[rows]
            asked = jnp.where(is_dropped & (asked < FIRST), 0, asked)
            batch = noised(images[rows], asked, schedule, key=noise_key)
            gradient = jax.grad(lambda p: mean_error(apply, p, batch))(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        begin = (params, optimizer.init(params))
        return jax.lax.scan(step, begin, jnp.arange(size.steps))[0][0]

    return run(params, images, prompts)


def mean_error(apply: Callable, params: PyTree, batch: Batch) -> Array:
    """Return the squared error of the noise, mean over rows and pixels."""
    return jnp.mean((apply(params, batch.inputs) - batch.targets) ** 2)


def moments(found: Room, prompts: Array | np.ndarray, *, key: Array, draws: int = 8) -> Curvature:
    """Return the feed-forward blocks' input moments at the sampler's first steps on some prompts.

    Diagonals alone, which is all that pruning reads.
    """
    path_key, label_key = jax.random.split(key)
    inputs = visited_inputs(
        found.apply,
        found.original,
        jnp.repeat(jnp.asarray(prompts, jnp.int32), draws),
        found.schedule,
        num_pixels=NUM_PIXELS,
        key=path_key,
    )
    return estimate(_diagonals(found.apply), found.original, [Batch(inputs)], key=label_key)


class Judgement(NamedTuple):
    """What a denoiser is worth.

    Attributes:
        memorised: share of the memorised prompts' samples that are copies of their image.
        distance: root mean square distance of these samples from their image, per pixel.
        confidence: the classifier's mean confidence in these samples: whether they are digits.
        accuracy: share of the digits' samples that the classifier takes for the digit asked for.
        frechet: Fréchet distance of the digits' samples from test images, over the logits.
    """

    memorised: float
    distance: float
    confidence: float
    accuracy: float
    frechet: float


def judge(
    found: Room, params: PyTree, *, key: Array, draws: int = 16, prompts: Array | None = None
) -> Judgement:
    """Sample, and measure; the draws are the same for every model with the same key.

    Args:
        found: the room.
        params: the denoiser's parameters.
        key: of the samples' noise.
        draws: samples for each prompt.
        prompts: which of the memorised prompts are looked at, counted from 0; None: all.
    """
    asked = jnp.arange(len(found.memorised)) if prompts is None else jnp.asarray(prompts)
    copy_key, class_key = jax.random.split(key)
    which = jnp.repeat(asked, draws)
    copies = samples(found, params, which + FIRST, key=copy_key)
    own = found.memorised[which]
    others = jnp.concatenate([found.memorised, found.images])
    labels = np.repeat(np.arange(NUM_CLASSES), 2 * draws)
    digits = samples(found, params, jnp.asarray(labels) + 1, key=class_key)
    logits = np.asarray(found.classify(digits))
    return Judgement(
        memorised=float(jnp.mean(memorised_samples(copies, own, others))),
        distance=float(jnp.sqrt(jnp.mean((copies - own) ** 2))),
        confidence=float(jnp.mean(jnp.max(jax.nn.softmax(found.classify(copies)), axis=1))),
        accuracy=float(np.mean(logits.argmax(1) == labels)),
        frechet=frechet_distance(logits, np.asarray(found.classify(found.test))),
    )


def samples(found: Room, params: PyTree, prompts: Array, *, key: Array) -> Array:
    """Draw one image for each prompt."""
    return denoise(found.apply, params, prompts, found.schedule, num_pixels=NUM_PIXELS, key=key)


@functools.cache
def _diagonals(apply: Callable):
    return kfac(apply, Gaussian(), select=FEED_FORWARD, factorize=Factorize(max_dim=1))


def _model(size: Size, key: Array) -> tuple[Callable, PyTree]:
    sizes = (NUM_PIXELS, FIRST + size.memorised, size.width, size.layers)
    num_pixels, num_prompts, width, layers = sizes
    _, params = denoiser(
        key=key, num_pixels=num_pixels, num_prompts=num_prompts, width=width, num_layers=layers
    )
    return _apply(*sizes), params


@functools.cache
def _apply(num_pixels: int, num_prompts: int, width: int, layers: int) -> Callable:
    """One function for all seeds, so that they share what is compiled."""
    return denoiser(
        key=jax.random.key(0),
        num_pixels=num_pixels,
        num_prompts=num_prompts,
        width=width,
        num_layers=layers,
    )[0]


def _split(rows: Images, number: int) -> tuple[Images, Images]:
    every = np.arange(len(rows.labels))
    return rows.take(every[:number]), rows.take(every[number:])


def _pixels(rows: Images) -> Array:
    return jnp.asarray(2 * rows.images.reshape(len(rows.images), -1) - 1)


def _classified(apply: Callable, params: PyTree, images: Array) -> Array:
    return apply(params, (images.reshape(-1, 8, 8, 1) + 1) / 2)
