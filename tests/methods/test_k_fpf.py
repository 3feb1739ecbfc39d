"""k-FPF in NumPy: which modules are sensitive, and each step of learning and of fine-tuning."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.methods import k_fpf, module_sensitivity, sensitive_modules
from jedit.objectives import LearnNLL, RetainNLL, with_retain
from jedit.training import Watch, unlearn
from jedit.transforms import finetune_modules

RATE, MOMENTUM, EVERY, TUNING = 0.3, 0.7, 3, 2


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"][None])
    return hidden @ params["head"]["kernel"]


@pytest.fixture
def scene(key):
    keys = jax.random.split(jax.random.clone(key), 5)
    params = {
        "body": {"kernel": jax.random.normal(keys[0], (4, 6)), "bias": jnp.zeros(6)},
        "head": {"kernel": jax.random.normal(keys[1], (6, 3))},
    }
    x = jax.random.normal(keys[2], (10, 4))
    y = jax.random.randint(keys[3], 10, 0, 3)
    cut = lambda i, j: Batch(x[i:j], y[i:j])  # noqa: E731
    return params, cut(0, 6), cut(6, 10)


def gradient(objective, params, sets):
    return jax.grad(lambda p: objective(network, p, *sets)[0])(params)


@pytest.mark.parametrize("held", [RetainNLL(), with_retain(LearnNLL())], ids=["old", "both"])
def test_each_step_is_the_one_of_two_loops_written_out(scene, held, key, tolerance):
    """Learning and fine-tuning in turn, each with a momentum of its own, the other's untouched."""
    params, new, buffer = scene
    sgd = optax.sgd(RATE, momentum=MOMENTUM)
    method = k_fpf(sgd, "^head/", every=EVERY, tuning_steps=TUNING, held=held)
    steps = 2 * (EVERY + TUNING) + 1
    seen = []
    watch = Watch(lambda state, _: seen.append(jax.tree.map(np.asarray, state.params)), every=1)
    unlearn(
        method, network, params, new, buffer, steps=steps, key=jax.random.clone(key), watch=watch
    )
    here = jax.tree.map(np.asarray, params)
    learning = jax.tree.map(np.zeros_like, here)
    tuning = np.zeros_like(here["head"]["kernel"])
    for step in range(steps):
        before = here
        if step % (EVERY + TUNING) < EVERY:
            g = gradient(LearnNLL(), here, (new, None))
            learning = jax.tree.map(lambda m, g: MOMENTUM * m + np.asarray(g), learning, g)
            here = jax.tree.map(lambda p, m: p - RATE * m, here, learning)
        else:
            g = np.asarray(gradient(held, here, (new, buffer))["head"]["kernel"])
            tuning = MOMENTUM * tuning + g
            here = {
                "body": here["body"],
                "head": {"kernel": here["head"]["kernel"] - RATE * tuning},
            }
            jax.tree.map(np.testing.assert_array_equal, seen[step]["body"], seen[step - 1]["body"])
        tolerance.check(seen[step], here)
        assert not np.array_equal(before["head"]["kernel"], here["head"]["kernel"])


def test_a_finetuner_of_its_own_and_weight_decay_that_moves_nothing_else(scene):
    params, new, buffer = scene
    made = finetune_modules(
        optax.sgd(0.0), "^head/", every=1, tuning_steps=1, finetuner=optax.adamw(0.1)
    )
    state = made.init(params)
    asked = []

    def retain_grad_fn(p):
        asked.append(1)
        return gradient(RetainNLL(), p, (None, buffer))

    g = gradient(LearnNLL(), params, (new, None))
    still, state = made.update(g, state, params, retain_grad_fn=retain_grad_fn)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(still))
    moved, state = made.update(g, state, params, retain_grad_fn=retain_grad_fn)
    assert np.all(moved["head"]["kernel"] != 0)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(moved["body"]))
    assert int(state.count) == 2


def test_the_sensitivity_is_the_loops(tolerance):
    rng = np.random.default_rng(1)

    def draw(scales):
        return {
            "body": {
                "kernel": scales[0] * rng.normal(size=(3, 5)),
                "bias": scales[0] * rng.normal(size=5),
            },
            "head": {"kernel": scales[1] * rng.normal(size=(5, 2))},
            "scale": scales[2] * rng.normal(size=7),
        }

    trajectory = [[draw((1, 1, 1)), draw((1, 2, 1))], [draw((2, 1, 3))], [draw((1, 9, 1))] * 3]
    found = module_sensitivity([[jax.tree.map(jnp.asarray, p) for p in t] for t in trajectory])
    of = {"body": ("body/kernel", "body/bias"), "head": ("head/kernel",), "scale": ("scale",)}
    expected = {}
    shares = []
    for pairs in (
        [(trajectory[0][1], trajectory[1][0]), (trajectory[1][0], trajectory[2][2])],
        [
            (trajectory[0][0], trajectory[0][1]),
            (trajectory[2][0], trajectory[2][1]),
            (trajectory[2][1], trajectory[2][2]),
        ],
    ):
        change = {}
        for module, paths in of.items():
            total, size = 0.0, 0
            for before, after in pairs:
                for path in paths:
                    a, b = before, after
                    for name in path.split("/"):
                        a, b = a[name], b[name]
                    total += sum(abs(x - y) for x, y in zip(a.ravel(), b.ravel(), strict=True))
                    size += a.size
            change[module] = total / size
        shares.append({m: c / sum(change.values()) for m, c in change.items()})
    expected = {m: shares[0][m] - shares[1][m] for m in of}
    tolerance.check(found, expected)
    assert abs(sum(found.values())) < 1e-6
    assert len({round(x, 3) for x in found.values()}) == 3
    order = sorted(expected, key=expected.get, reverse=True)
    pattern = sensitive_modules(found, count=2)
    paths = [path for paths in of.values() for path in paths]
    chosen = {path for path in paths if re.search(pattern, path)}
    assert chosen == {path for module in order[:2] for path in of[module]}


def test_modules_with_like_names_are_told_apart():
    pattern = sensitive_modules({"layers/1": 0.3, "layers/10": -0.1, "a.b": -0.2}, count=1)
    assert re.search(pattern, "layers/1/kernel")
    assert not re.search(pattern, "layers/10/kernel")
    assert not re.search(pattern, "layers/1/router/kernel")  # a module of its own
    assert re.search(sensitive_modules({"a.b": 1.0}, count=1), "a.b")
    assert not re.search(sensitive_modules({"a.b": 1.0}, count=1), "axb")


@pytest.mark.usefixtures("unchecked_annotations")
def test_what_cannot_be_gets_a_sentence(scene):
    params, new, _ = scene
    with pytest.raises(ValueError, match="needs two tasks, and two epochs of one of them"):
        module_sensitivity([[params], [params]])
    with pytest.raises(ValueError, match="no parameter has changed"):
        module_sensitivity([[params, params], [params]])
    with pytest.raises(ValueError, match="count is 3, and there are 2 modules"):
        sensitive_modules({"a": 0.0, "b": 0.0}, count=3)
    with pytest.raises(ValueError, match="every must be at least 1"):
        k_fpf(optax.sgd(0.1), "head", every=0, tuning_steps=1)
    made = finetune_modules(optax.sgd(0.1), "tail", every=1, tuning_steps=1)
    with pytest.raises(ValueError, match="select='tail' matches no trained parameter"):
        made.init(params)
    made = finetune_modules(optax.sgd(0.1), "head", every=1, tuning_steps=1)
    with pytest.raises(ValueError, match="needs params and the extra argument retain_grad_fn"):
        made.update(params, made.init(params), params)
    assert len(new.targets) == 6
