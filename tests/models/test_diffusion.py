"""The denoiser against plain NumPy, and its noise and its sampler against known answers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch, NoisedImages
from jedit.curvature import estimate, factors, kfac
from jedit.curvature.likelihoods import Gaussian
from jedit.models import cosine_schedule, denoise, denoiser, noised, visited_inputs
from jedit.tracing import capture, find_sites, weight_gradients
from tests.models.test_models import numpy_tree, paths, randomised

PIXELS, PROMPTS, WIDTH = 6, 4, 5


@pytest.fixture
def model(key):
    make, shift = jax.random.split(key)
    apply, params = denoiser(
        key=make,
        num_pixels=PIXELS,
        num_prompts=PROMPTS,
        width=WIDTH,
        num_layers=2,
        dtype=jnp.result_type(float),
    )
    return apply, randomised(params, shift)


@pytest.fixture
def inputs():
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.normal(size=(7, PIXELS)))
    return NoisedImages(images, jnp.arange(7) * 3, jnp.asarray([0, 1, 2, 3, 3, 1, 0]))


def by_numpy(tree, inputs):
    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]
        )

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    images, steps, prompts = (np.asarray(x) for x in inputs)
    rates = np.exp(-math.log(2000.0) * np.arange(16) / 16)
    angles = steps[:, None] * rates
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    condition = dense(tree["time"], waves) + tree["prompts"]["embedding"][prompts]
    condition = condition / (1 + np.exp(-condition))
    x = dense(tree["read"], images)
    for i in range(2):
        block = tree["blocks"][str(i)]
        gain, shift = (dense(block[n], condition) for n in ("gain", "shift"))
        h = norm(block["norm"], x) * (1 + gain) + shift
        x = x + dense(block["ffn"]["down"], gelu(dense(block["ffn"]["up"], h)))
    return dense(tree["write"], norm(tree["norm"], x))


def test_the_denoiser_is_its_definition(model, inputs, tolerance):
    apply, params = model
    expected = by_numpy(numpy_tree(params), inputs)
    # The waves are of float32's angles.
    np.testing.assert_allclose(apply(params, inputs), expected, rtol=1e-4, atol=1e-4)
    assert apply(params, inputs).dtype == jnp.result_type(float)
    del tolerance


def test_every_parameter_is_a_site_whose_gradient_is_jaxs(model, inputs, tolerance):
    apply, params = model
    sites = find_sites(apply, params, inputs)
    assert not sites.uncovered
    outputs, activations, pullback = capture(apply, params, inputs)
    cotangent = jnp.cos(outputs)
    found = weight_gradients(sites, activations, pullback(cotangent))
    expected = paths(jax.grad(lambda p: jnp.sum(apply(p, inputs) * cotangent))(params))
    assert set(found) == set(expected)
    for path, gradient in expected.items():
        tolerance.check(found[path], gradient, "contraction")


def test_kfac_sees_what_enters_the_feed_forward_blocks(model, inputs, key, tolerance):
    """A of a block's first matrix is the mean of its inputs' outer products, by a forward pass."""
    apply, params = model
    made = kfac(apply, Gaussian(), select="blocks/./ffn")
    curvature = estimate(made, params, [Batch(inputs)], key=key)
    assert set(curvature.blocks) == {
        f"blocks/{i}/ffn/{n}/kernel" for i in (0, 1) for n in ("up", "down")
    }
    _, activations, _ = capture(apply, params, inputs, "blocks/0/ffn/up/kernel")
    (entering,) = activations.values()
    rows = np.asarray(entering).reshape(7, WIDTH)
    found = factors(curvature, "blocks/0/ffn/up/kernel")[0][:WIDTH, :WIDTH]
    tolerance.check(found, jnp.asarray(rows.T @ rows / 7), "contraction")


def test_the_schedule_falls_from_signal_to_noise_by_the_papers_cosine():
    shares = cosine_schedule(50)
    f = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    assert shares[0] == pytest.approx(f(1 / 50) / f(0), rel=1e-6)
    assert shares[29] == pytest.approx(f(30 / 50) / f(0), rel=1e-6)
    assert np.all(np.diff(shares) < 0)
    assert 0 < shares[-1] < 1e-3


def test_noise_is_the_target_and_has_the_schedules_variance(key):
    """Mean and variance of the noised pixels are √ᾱ x₀ and 1 - ᾱ, within five standard errors."""
    schedule = cosine_schedule(10)
    image = jnp.asarray([0.5, -1.0, 0.25])
    count = 20000
    rows = noised(
        jnp.broadcast_to(image, (count, 3)), jnp.zeros(count, jnp.int32), schedule, key=key
    )
    mixed, steps, _ = (np.asarray(x) for x in rows.inputs)
    share = schedule[steps][:, None]
    again = np.sqrt(share) * np.asarray(image) + np.sqrt(1 - share) * np.asarray(rows.targets)
    np.testing.assert_allclose(mixed, again, rtol=1e-4, atol=1e-5)
    for t in (0, 4, 9):
        of_step = mixed[steps == t]
        error = np.sqrt((1 - schedule[t]) / len(of_step))
        expected = np.sqrt(schedule[t]) * np.asarray(image)
        assert np.all(np.abs(of_step.mean(0) - expected) < 5 * error)
        assert np.all(
            np.abs(of_step.var(0) / (1 - schedule[t]) - 1) < 5 * np.sqrt(2 / len(of_step))
        )
    counts = np.bincount(steps, minlength=10)
    assert np.all(np.abs(counts - count / 10) < 5 * np.sqrt(count * 0.09))


def gaussian_model(schedule, mean, deviation):
    """The exact denoiser of images drawn from a normal distribution, by Bayes."""
    shares = jnp.asarray(schedule)

    def apply(params, inputs):
        share = shares[inputs.steps][:, None].astype(inputs.images.dtype)
        spread = share * deviation**2 + 1 - share
        return (
            jnp.sqrt(1 - share) * (inputs.images - jnp.sqrt(share) * params["mean"][None]) / spread
        )

    return apply, {"mean": jnp.asarray(mean)}


def test_the_sampler_arrives_at_the_only_image_there_is(key):
    schedule = cosine_schedule(40)
    apply, params = gaussian_model(schedule, [0.5, -0.75, 0.0], 0.0)
    images = denoise(apply, params, jnp.zeros(4, jnp.int32), schedule, num_pixels=3, key=key)
    np.testing.assert_allclose(images, jnp.broadcast_to(params["mean"], (4, 3)), atol=1e-5)


def test_samples_of_a_normal_distribution_have_its_mean_and_deviation(key):
    """DDIM with the exact denoiser: the flow's own answer is x = m + σ z, z the first noise."""
    schedule = cosine_schedule(400)
    mean, deviation = [0.1, -0.2], 0.1
    apply, params = gaussian_model(schedule, mean, deviation)
    prompts = jnp.zeros(50, jnp.int32)
    images = denoise(apply, params, prompts, schedule, num_pixels=2, num_steps=400, key=key)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (2,)) for i in range(50)])
    np.testing.assert_allclose(images, params["mean"][None] + deviation * noise, atol=0.02)


def test_what_the_first_steps_see_is_the_way_of_the_sampler(model, key):
    apply, params = model
    schedule = cosine_schedule(30)
    prompts = jnp.asarray([1, 2, 3])
    options = {"num_pixels": PIXELS, "num_steps": 10, "key": key}
    seen = visited_inputs(apply, params, prompts, schedule, first=10, **options)
    assert seen.images.shape == (30, PIXELS)
    assert seen.steps[::3].tolist() == np.linspace(29, 0, 10).round().astype(int).tolist()
    assert seen.prompts.tolist() == [1, 2, 3] * 10
    x = np.asarray(seen.images[:3])
    for i in range(9):  # NumPy's own loop
        now = slice(3 * i, 3 * i + 3)
        np.testing.assert_allclose(x, seen.images[now], rtol=1e-4, atol=1e-4)
        share, later = schedule[int(seen.steps[3 * i])], schedule[int(seen.steps[3 * i + 3])]
        noise = np.asarray(apply(params, jax.tree.map(lambda leaf, now=now: leaf[now], seen)))
        clean = np.clip((x - np.sqrt(1 - share) * noise) / np.sqrt(share), -1, 1)
        left = (x - np.sqrt(share) * clean) / np.sqrt(1 - share)
        x = np.sqrt(later) * clean + np.sqrt(1 - later) * left
    few = visited_inputs(apply, params, prompts, schedule, first=2, **options)
    np.testing.assert_array_equal(few.images, seen.images[:6])


def test_bfloat16_neither_divides_by_zero_nor_loses_its_way(key):
    """In bfloat16 1 - ᾱ of the last step is 0; the roots and the steps between are wider."""
    schedule = cosine_schedule(100)
    assert float(jnp.bfloat16(1) - jnp.bfloat16(schedule[0])) == 0
    apply, params = gaussian_model(schedule, [0.5, -0.75, 0.0], 0.0)

    def narrow(params, inputs):
        assert inputs.images.dtype == jnp.bfloat16
        wide = inputs._replace(images=inputs.images.astype(jnp.float32))
        return apply(jax.tree.map(lambda p: p.astype(jnp.float32), params), wide).astype(
            jnp.bfloat16
        )

    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    prompts = jnp.zeros(4, jnp.int32)
    images = denoise(narrow, params, prompts, schedule, num_pixels=3, key=key)
    assert images.dtype == jnp.bfloat16
    expected = np.broadcast_to([0.5, -0.75, 0.0], (4, 3))
    np.testing.assert_allclose(np.asarray(images, np.float32), expected, atol=0.02)
    rows = noised(jnp.ones((500, 3), jnp.bfloat16), jnp.zeros(500, jnp.int32), schedule, key=key)
    early = np.asarray(rows.inputs.steps) == 0
    away = np.asarray(rows.inputs.images, np.float32)[early] - np.sqrt(schedule[0])
    assert rows.inputs.images.dtype == jnp.bfloat16
    assert early.any()
    assert np.any(away != away[0, 0])  # some noise is left in it


def test_the_inputs_of_the_first_steps_cost_these_steps_alone(model, key):
    _, params = model
    calls = []

    def counted(params, inputs):
        del params
        jax.debug.callback(lambda _: calls.append(1), inputs.steps[0])
        return inputs.images

    options = {"num_pixels": PIXELS, "num_steps": 10, "key": key}
    prompts, schedule = jnp.zeros(2, jnp.int32), cosine_schedule(20)
    jax.block_until_ready(visited_inputs(counted, params, prompts, schedule, first=3, **options))
    jax.effects_barrier()
    assert len(calls) == 3


def test_more_steps_than_there_are_are_refused(model, key):
    apply, params = model
    schedule, prompts = cosine_schedule(5), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="schedule has 5 steps, got num_steps=20"):
        denoise(apply, params, prompts, schedule, num_pixels=PIXELS, key=key)
    with pytest.raises(ValueError, match="first must be at most the 4 steps"):
        visited_inputs(apply, params, prompts, schedule, num_pixels=PIXELS, num_steps=4, key=key)
