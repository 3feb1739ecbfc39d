"""Learning on: the protocol's looks, rows and reference, against a loop written by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.objectives import LearnNLL, with_retain
from jedit.recipes.learners import joint
from jedit.recipes.learning_on import (
    Kept,
    Learner,
    accuracies,
    learn_on,
    plain,
    stability,
)
from jedit.training import TrainingMethod

STEPS, RATE = 6, 0.5


def apply(params, inputs):
    return inputs @ params["kernel"]


@pytest.fixture(scope="module")
def scene():
    """Two tasks of a linear classifier, whole sets in a step, so that no order matters."""
    rng = np.random.default_rng(0)
    tasks = []
    for label in (0, 2):
        targets = label + (np.arange(8) % 2)
        inputs = rng.normal(size=(8, 5)) + np.eye(5)[targets] * 2
        tasks.append(Batch(jnp.asarray(inputs), jnp.asarray(targets.astype(np.int32))))
    return {"kernel": jnp.zeros((5, 4), tasks[0].inputs.dtype)}, tasks


def by_hand(tasks, weight=0.0, scale=1.0):
    """Gradient descent in NumPy; in the second task with the first one's rows at a weight."""
    kernel, out = np.zeros((5, 4)), []

    def gradient(batch):
        x, y = np.asarray(batch.inputs, np.float64), np.asarray(batch.targets)
        z = np.exp(x @ kernel)
        p = z / z.sum(axis=1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        return x.T @ p / len(y)

    def look():
        out.append(
            [
                np.mean(np.argmax(np.asarray(t.inputs) @ kernel, axis=1) == np.asarray(t.targets))
                for t in tasks
            ]
        )

    look()
    for number, task in enumerate(tasks):
        for _ in range(STEPS):
            step = gradient(task) + (weight * gradient(tasks[0]) if number else 0)
            kernel = kernel - RATE * step * (scale if number else 1)
            look()
    return kernel, np.asarray(out)


def run(learner, scene, **options):
    params, tasks = scene
    return learn_on(
        learner,
        apply,
        params,
        tasks,
        steps=STEPS,
        evaluate=accuracies(apply, tasks),
        key=jax.random.key(0),
        **options,
    )


def test_every_update_of_every_task_is_looked_at(scene, tolerance):
    learnt = run(Learner(plain(optax.sgd(RATE))), scene)
    kernel, scores = by_hand(scene[1])
    tolerance.check(learnt.params, {"kernel": kernel})
    assert np.allclose(learnt.scores, scores, atol=1e-6)
    assert learnt.updates.tolist() == list(range(2 * STEPS + 1))
    assert learnt.ends.tolist() == [STEPS, 2 * STEPS]
    rare = run(Learner(plain(optax.sgd(RATE))), scene, every=3)
    assert np.allclose(rare.scores, scores[::3], atol=1e-6)
    assert rare.ends.tolist() == [2, 4]


def test_rows_that_are_kept_are_seen_from_the_second_task_on(scene, tolerance):
    seen = []

    def keep(apply, params, rows, kept, *, key):
        del apply, params, key
        seen.append(kept)
        return Kept(rows)

    method = TrainingMethod(with_retain(LearnNLL(), weight=0.7), optax.sgd(RATE))
    learnt = run(Learner(method, keep), scene)
    kernel, scores = by_hand(scene[1], weight=0.7)
    tolerance.check(learnt.params, {"kernel": kernel})
    assert np.allclose(learnt.scores, scores, atol=1e-6)
    assert seen == [None]  # nothing was kept before, and after the last task nothing has to be


def test_joint_learning_is_of_the_mean_over_all_rows(scene, tolerance):
    learnt = run(joint(optax.sgd(RATE)), scene)
    kernel, scores = by_hand(scene[1], weight=1.0, scale=0.5)
    tolerance.check(learnt.params, {"kernel": kernel})
    assert np.allclose(learnt.scores, scores, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Pulled:
    """Pulls towards the reference alone."""

    def __call__(self, apply, params, forget, retain=None, reference=None):
        del apply, forget, retain
        assert reference is not None
        loss = jnp.sum((params["kernel"] - reference["there"]) ** 2) / 2
        return loss, {}


@pytest.mark.parametrize("is_made", [False, True])
def test_what_is_kept_is_the_reference_of_the_next_task(scene, tolerance, is_made):
    there = jnp.full((5, 4), 3.0, scene[0]["kernel"].dtype)

    def keep(*_, **__):
        return Kept(reference={"there": there})

    method = TrainingMethod(Pulled(), optax.sgd(RATE))
    if is_made:
        learner = Learner(lambda _: method, keep, plain(optax.sgd(RATE)))
    else:
        learner = Learner(method, keep)
    learnt = run(learner, scene)
    first = by_hand(scene[1][:1])[0]
    expected = there + (first - there) * (1 - RATE) ** STEPS
    tolerance.check(learnt.params["kernel"], expected)


def test_a_gap_that_closes_again_is_seen(scene):
    learnt = run(Learner(plain(optax.sgd(RATE))), scene)
    scores = np.ones((13, 2))
    scores[:7, 1] = 0.5
    scores[7, 0] = 0.25  # the first task, one step after the second was begun
    found = stability(learnt._replace(scores=scores), windows=(2, 5))
    assert found.final == 1
    assert found.minimum == 0.25
    assert found.worst_case == (1 + 0.25) / 2
    # The second task counts from the sixth look on, when it was begun.
    assert found.forgetting == {2: 0.375, 5: 0.375}
    assert found.plasticity == {2: (0.75 + 0.5) / 2, 5: (0.75 + 0.5) / 2}


def test_what_is_no_stream_is_refused(scene):
    with pytest.raises(ValueError, match="at least two tasks, got 1"):
        run(Learner(plain(optax.sgd(RATE))), (scene[0], scene[1][:1]))
    with pytest.raises(ValueError, match="every must divide steps, got 4 and 6"):
        run(Learner(plain(optax.sgd(RATE))), scene, every=4)
    with pytest.raises(ValueError, match="needs `first`"):
        run(Learner(lambda _: plain(optax.sgd(RATE))), scene)
    with pytest.raises(ValueError, match="one score for each of 2 tasks"):
        learn_on(
            Learner(plain(optax.sgd(RATE))),
            apply,
            *scene,
            steps=STEPS,
            evaluate=lambda _: jnp.zeros(3),
            key=jax.random.key(0),
        )
