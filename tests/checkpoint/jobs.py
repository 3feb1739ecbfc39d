"""A loop and an estimate of many cheap steps; and, run by itself, killed again and again.

As a program: imports once, then forks a process for each attempt, so that twenty kills need not
take twenty times the seconds that an import takes. Nothing of JAX's is started before a fork.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jedit
from jedit.curvature import Curvature, Estimator

NUM_KILLS = 20


def loss_fn(params, rows):
    error = jnp.tanh(rows["x"] @ params["w"]) - rows["y"]
    loss = jnp.mean(error**2)
    return loss, {"half": loss / 2}


def loop(checkpoint, steps=24, seed=0, every=None, callback=None, **changed):
    """`fit` by Adam with a decaying rate; a weakly typed number stands in its state."""
    numbers = np.random.default_rng(seed)
    data = {"x": jnp.asarray(numbers.normal(size=(10, 3)), "float32")}
    data["y"] = jnp.tanh(data["x"] @ jnp.ones((3, 2), "float32"))
    with jax.numpy_dtype_promotion("standard"):
        return jedit.fit(
            loss_fn,
            optimizer(),
            {"w": jnp.zeros((3, 2), "float32"), "frozen": jnp.arange(2)},
            data,
            **{"key": jax.random.key(seed), "epochs": steps * 4 / 10, "batch_size": 4, **changed},
            watch=jedit.Watch(callback, every, checkpoint),
        )


def optimizer():
    return optax.chain(
        optax.add_noise(0.1, 0.5, jax.random.key(3)),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    )


def _add(batch, key, params, state):
    count, total = state
    noise = jax.random.normal(jax.random.fold_in(key, count), (3,), "float32")
    return count + 1, total + jnp.sin(total) * 0.1 + (batch.inputs + noise) @ params


# Not linear in its sums, so that no step may be left out, doubled or exchanged.
ESTIMATOR = Estimator(
    init=lambda params, batch: (jnp.int32(0), jnp.zeros(params.shape[1:], batch.inputs.dtype)),
    update=lambda state, params, batch, key: _add(batch, key, params, state),
    finalize=lambda state: Curvature({}, {}, jnp.append(state[1], state[0].astype("float32"))),
)


def estimate(checkpoint, num_batches=24, seed=0, pause=0.0, stop=None):
    """`estimate` with sums that depend on every batch and on their order."""

    def batches():
        numbers = np.random.default_rng(seed)
        for i in range(num_batches):
            if i == stop:
                raise KeyboardInterrupt
            time.sleep(pause)
            yield jedit.Batch(jnp.asarray(numbers.normal(size=3), "float32"))

    params = jnp.asarray(np.random.default_rng(7).normal(size=(3, 2)), "float32")
    return jedit.estimate(
        ESTIMATOR, params, batches(), key=jax.random.key(2), checkpoint=checkpoint
    )


def to_bytes(tree):
    """All bits of a tree, as text."""
    return [[str(x.dtype), x.shape, np.asarray(x).tobytes().hex()] for x in jax.tree.leaves(tree)]


class Told(jedit.Checkpoint):
    """Tells through a pipe from which step the job goes on, and when it first saves."""

    def __init__(self, folder, pipe):
        super().__init__(folder, every=2)
        self.pipe, self.num_saves = pipe, 0

    def resume(self, job, given, state):
        found = super().resume(job, given, state)
        os.write(self.pipe, bytes([found[0]]))
        return found

    def save(self, step, state, history=None):
        super().save(step, state, history)
        self.num_saves += 1
        if self.num_saves == 1:
            os.write(self.pipe, b"s")


def attempt(job, folder, out, pipe):
    """In a process of its own: do or go on with a job, and write what came of it."""
    new = out.with_suffix(".new")
    new.write_text(json.dumps(to_bytes(job(Told(folder, pipe)))))
    new.rename(out)


def main(folder):
    """Each job once in peace, and once killed; says at which steps it went on."""
    generator = random.Random(5)
    found = {}
    jobs = {
        "loop": (partial(loop, steps=40), 12),
        "estimate": (partial(estimate, num_batches=40), 8),
    }
    for name, (job, num_kills) in jobs.items():
        process, pipe = begin(job, folder / f"{name}-peace", folder / f"{name}-peace.json")
        for _ in range(2):
            os.read(pipe, 1)
        started = time.monotonic()
        assert os.waitpid(process, 0)[1] == 0
        # So that the kills fall within the job, whatever the machine's speed.
        patience = (time.monotonic() - started) / num_kills
        starts, num_in_save, kills = [], 0, 0
        while kills < num_kills:  # a job that comes to its end before them is begun once more
            starts.append([])
            place = folder / f"{name}-killed-{len(starts)}"
            while not (out := place.with_suffix(".json")).exists():
                process, pipe = begin(job, place, out)
                starts[-1] += os.read(pipe, 1)
                if kills < num_kills:
                    # Before the first save, too: one time in four.
                    if generator.random() > 0.25:
                        os.read(pipe, 1)
                    time.sleep(generator.uniform(0, patience))
                    os.kill(process, signal.SIGKILL)
                status = os.waitpid(process, 0)[1]
                os.close(pipe)
                assert os.WIFSIGNALED(status) or status == 0, status
                kills += os.WIFSIGNALED(status)
                num_in_save += any(place.glob(".tmp-*"))
        found[name] = {"starts": starts, "kills": kills, "in_save": num_in_save}
    sys.stdout.write(json.dumps(found) + "\n")


def begin(job, folder, out):
    """Fork a process that does a job; its number, and where to read what it tells."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            attempt(job, folder, out, writing)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    return process, reading


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX warns of forks; it is not yet started here
    main(Path(sys.argv[1]))
