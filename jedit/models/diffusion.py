"""Denoising diffusion (arXiv 2006.11239): noise for training, images by DDIM (arXiv 2010.02502).

    x_t = √ᾱ_t x₀ + √(1 - ᾱ_t) ε                      noised
    ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s) π/2)        cosine schedule (arXiv 2102.09672)
    x̂₀ = (x_t - √(1 - ᾱ_t) ε̂) / √ᾱ_t, clipped to [-1, 1]
    x_s = √ᾱ_s x̂₀ + √(1 - ᾱ_s) (x_t - √ᾱ_t x̂₀)/√(1 - ᾱ_t)   a DDIM step from t to s < t, η = 0

    ᾱ   share of the signal's variance by step, falling          `schedule`
    ε̂   what the model says the noise is                         `apply`

A model is any `apply(params, NoisedImages) -> noise`; images are flat, with pixels in [-1, 1]. No
classifier-free guidance: the model's answer to the prompt is taken as it is.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key, PyTree

from jedit.core.arguments import check_function, check_key, check_params
from jedit.core.batch import Apply, Batch, NoisedImages
from jedit.core.checks import COUNT, check_numbers
from jedit.core.precision import wide_dtype

OFFSET = 0.008  # s of the cosine schedule [paper]
LEAST = 1e-4  # ᾱ of the last step: a division by its root


def cosine_schedule(num_steps: int) -> Float32[np.ndarray, " num_steps"]:
    """Return ᾱ of the steps 1 to T of a cosine schedule, which falls from nearly 1 to nearly 0."""
    check_numbers(COUNT, num_steps=num_steps)
    angle = (np.arange(num_steps + 1) / num_steps + OFFSET) / (1 + OFFSET) * math.pi / 2
    shares = np.cos(angle) ** 2
    return np.maximum(shares[1:] / shares[0], LEAST).astype(np.float32)


def noised(
    images: Float[Array, "n pixels"],
    prompts: Int[Array, " n"],
    schedule: Float[Array, " steps"] | Float32[np.ndarray, " steps"],
    *,
    key: Key[Array, ""],
) -> Batch:
    """Return a batch of the images at steps drawn evenly, with the noise in them as its targets.

    The loss of the batch is the Gaussian one, whose mean over draws is the DDPM objective with all
    steps weighted alike (its L_simple).
    """
    step_key, noise_key = jax.random.split(key)
    steps = jax.random.randint(step_key, prompts.shape, 0, len(schedule), jnp.int32)
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    # Both roots before they are narrowed: in bfloat16 1 - ᾱ of the first steps is 0.
    share = jnp.asarray(schedule, wide_dtype(images.dtype))[steps][:, None]
    signal, left = (jnp.sqrt(x).astype(images.dtype) for x in (share, 1 - share))
    mixed = signal * images + left * noise
    # Said outright, because targets that are images would be taken for labels of every pixel.
    ones = jnp.ones(prompts.shape, jnp.float32)
    return Batch(NoisedImages(mixed, steps, prompts), noise, ones, ones)


def denoise(
    apply: Apply,
    params: PyTree,
    prompts: Int[Array, " n"],
    schedule: Float32[np.ndarray, " steps"],
    *,
    num_pixels: int,
    num_steps: int = 20,
    key: Key[Array, ""],
) -> Float[Array, "n pixels"]:
    """Draw one image for each prompt, by DDIM.

    Args:
        apply: `apply(params, NoisedImages) -> noise`.
        params: the parameters.
        prompts: number of each image's prompt.
        schedule: ᾱ of the steps that the model was trained on.
        num_pixels: number of pixels of an image.
        num_steps: how many of the steps are taken, at equal distances; 20 is arbitrary.
        key: of the noise that each image begins as. Image i's is its own: that of
            `fold_in(key, i)`.

    Returns:
        The images, pixels in [-1, 1]. Costs `num_steps` forward passes in one compiled call.

    Raises:
        ValueError: more steps than the schedule has.
    """
    path = _path(apply, params, schedule, num_pixels, num_steps, key=key)
    return _walk(apply, False, params, *_begin(params, prompts, num_pixels, key=key), path)[0]


def visited_inputs(
    apply: Apply,
    params: PyTree,
    prompts: Int[Array, " n"],
    schedule: Float32[np.ndarray, " steps"],
    *,
    num_pixels: int,
    num_steps: int = 20,
    first: int = 5,
    key: Key[Array, ""],
) -> NoisedImages:
    """Return what the model sees in the first denoising steps of `denoise`, which begin at noise.

    Args:
        apply: as for `denoise`, like all that follow.
        params: the parameters.
        prompts: number of each image's prompt.
        schedule: ᾱ of the steps that the model was trained on.
        num_pixels: number of pixels of an image.
        num_steps: number of the sampler's steps.
        first: how many of them are returned; 5, a quarter, is arbitrary.
        key: of the noise that each image begins as.

    Returns:
        Inputs of `first` times as many rows as there are prompts, step by step. Costs `first`
        forward passes.

    Raises:
        ValueError: `first` is more than the sampler's steps, or these more than the schedule's.
    """
    check_numbers(COUNT, first=first, num_steps=num_steps)
    if first > num_steps:
        raise ValueError(f"first must be at most the {num_steps} steps of the sampler, got {first}")
    path = _path(apply, params, schedule, num_pixels, num_steps, key=key)
    path = tuple(x[:first] for x in path)
    begin = _begin(params, prompts, num_pixels, key=key)
    seen = _walk(apply, True, params, *begin, path)[1]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)


def _path(apply, params, schedule, num_pixels, num_steps, *, key) -> tuple[Array, Array, Array]:
    """Check, and return the steps that are taken, and ᾱ at each and after it.

    Raises:
        ValueError: more steps than the schedule has.
    """
    check_numbers(COUNT, num_pixels=num_pixels, num_steps=num_steps)
    check_function(apply)
    check_params(params)
    check_key(key)
    if num_steps > len(schedule):
        raise ValueError(f"the schedule has {len(schedule)} steps, got num_steps={num_steps}")
    steps = np.linspace(len(schedule) - 1, 0, num_steps).round().astype(np.int32)
    shares = np.asarray(schedule)[steps]
    after = np.append(shares[1:], np.float32(1))
    dtype = wide_dtype(jax.tree.leaves(params)[0].dtype)
    return jnp.asarray(steps), jnp.asarray(shares, dtype), jnp.asarray(after, dtype)


def _begin(params, prompts, num_pixels, *, key) -> tuple[Array, Array]:
    """Return the prompts as int32, and the noise that each image begins as."""
    dtype = jax.tree.leaves(params)[0].dtype
    begin = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (num_pixels,), dtype))(
        jnp.arange(len(prompts))
    )
    return jnp.asarray(prompts, jnp.int32), begin


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk(apply, is_kept: bool, params, prompts, begin, path) -> tuple[Array, NoisedImages | None]:
    """Take the steps of the path; return where it ends and, if kept, all inputs, (steps, n, ...).

    The model sees its own dtype. All between is at least float32: in bfloat16 1 - ᾱ of the last
    steps is 0, and a division by its root is infinite.
    """
    dtype = begin.dtype

    def step(x, now):
        index, share, later = now
        inputs = NoisedImages(x.astype(dtype), jnp.broadcast_to(index, prompts.shape), prompts)
        noise = apply(params, inputs).astype(x.dtype)
        clean = jnp.clip((x - jnp.sqrt(1 - share) * noise) / jnp.sqrt(share), -1, 1)
        # Of the clipped image: the noise that is left would else push it out again.
        left = (x - jnp.sqrt(share) * clean) / jnp.sqrt(1 - share)
        x = jnp.sqrt(later) * clean + jnp.sqrt(1 - later) * left
        return x, inputs if is_kept else None

    end, seen = jax.lax.scan(step, begin.astype(path[1].dtype), path)
    return end.astype(dtype), seen
