"""The methods of the vision protocol: how each is run, and the four settings each is tried at.

All that train take as many steps, of as many rows, and SGD with momentum 0.9; GU has an Adam of
its own.  GA and GU never see a retain loss, fine-tuning, l1-sparse, UAM and ROSU descend one, and
random label and SalUn descend it beside the loss of wrong labels.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jedit import methods
from jedit.core.batch import Batch
from jedit.curvature import Curvature, Estimator, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches
from jedit.edits import apply_edit
from jedit.methods import CATALOGUE, Material, Need
from jedit.objectives import GA, relabel
from jedit.recipes.comparison.trajectories import destroyed
from jedit.training import LoopState, TrainingMethod, Watch, unlearn
from tests.bench.vision_protocol.vision import Method, Protocol, Setting, Task

NUM_CLASSES = 10
KFADE_ASCENT = methods.Ascent(steps=1)
# Steps of one compiled call; a run is a whole multiple of it.
STRIDE = 10
# The learning rate stands in the state, so that a grid of them compiles once.
SGD = optax.inject_hyperparams(optax.sgd, static_args=("momentum", "nesterov"))(
    learning_rate=0.0, momentum=0.9
)


def _num_steps(task: Task, protocol: Protocol) -> int:
    steps = protocol.epochs * len(task.retain.inputs) / protocol.batch_size
    return STRIDE * math.ceil(steps / STRIDE)


def _trained(
    task: Task,
    protocol: Protocol,
    method: TrainingMethod,
    rate: float,
    key: Array,
    forget: Batch,
) -> tuple[PyTree, float]:
    state = method.optimizer.init(task.params)
    zero = optax.tree_utils.tree_get(state, "learning_rate")
    state = optax.tree_utils.tree_set(state, learning_rate=jnp.full_like(zero, rate))
    run = functools.partial(
        unlearn,
        method._replace(batch_size=protocol.batch_size),
        task.apply,
        LoopState(0, task.params, state),
        forget,
        task.retain,
        key=key,
        watch=Watch(every=STRIDE),
    )
    try:
        jax.block_until_ready(run(steps=STRIDE))  # compiles
        (params, _), seconds = _timed(lambda: run(steps=_num_steps(task, protocol)))
    except FloatingPointError:  # the rate was too large
        return destroyed(task.params), math.nan
    return params, seconds


def _by_row(name: str, **fixed) -> Callable:
    """A run of the catalogue's method that trains, at a setting's rate and its own settings."""
    row = CATALOGUE[name]

    def run(task, protocol, setting, key):
        settings = fixed | {name: value for name, value in setting.items() if name != "rate"}
        material = Material(
            task.apply,
            task.params,
            task.forget,
            optimizer=SGD,
            num_classes=NUM_CLASSES,
            steps=_num_steps(task, protocol),
        )

        def made():
            method = row.of(material, **settings)
            return method, method.optimizer.init(task.params)  # with what it has computed

        made()  # compiles
        (method, _), making = _timed(made)
        forget = task.forget
        if Need.NUM_CLASSES in row.needs:  # wrong labels, others for each seed
            forget = relabel(task.forget, NUM_CLASSES, key=jax.random.fold_in(key, 1))
        params, seconds = _trained(task, protocol, method, setting["rate"], key, forget)
        return params, seconds + making

    return run


def _engram(task, protocol, setting, key):
    def fit(sets):
        # What is estimated on a part of a set counts for the whole of it.
        for i, rows in enumerate(sets):
            some = _first(rows, protocol.curvature_rows)
            found = _curvature(task, some, protocol, jax.random.fold_in(key, i))
            share = len(rows.inputs) / len(some.inputs)
            yield dataclasses.replace(found, num_outputs=found.num_outputs * share)

    def edited(*sets):
        edit, _ = methods.engram(task.params, *fit(sets), **setting)
        return apply_edit(task.params, edit)

    edited(_first(task.forget, protocol.chunk), _first(task.retain, protocol.chunk))
    return _timed(lambda: edited(task.forget, task.retain))


def _kfade(task, protocol, setting, key):
    probe = _first(task.retain, protocol.probe_rows)

    def edited(forget, rows):
        curvature = _curvature(task, rows, protocol, key)
        chunks = (_chunks(forget, protocol), _chunks(probe, protocol))
        edit, _ = methods.kfade(
            task.apply, task.params, curvature, *chunks, ascent=KFADE_ASCENT, **setting
        )
        return apply_edit(task.params, edit)

    edited(_first(task.forget, protocol.chunk), _first(task.retain, protocol.chunk))
    return _timed(lambda: edited(task.forget, _first(task.retain, protocol.curvature_rows)))


def _timed(make: Callable) -> tuple:
    start = time.perf_counter()
    made = jax.block_until_ready(make())
    return made, time.perf_counter() - start


def _first(rows: Batch, num_rows: int) -> Batch:
    return jax.tree.map(lambda x: x[:num_rows], rows)


@functools.cache
def _estimator(apply: Callable) -> Estimator:
    return kfac(apply, Categorical())


def _curvature(task: Task, rows: Batch, protocol: Protocol, key: Array) -> Curvature:
    return estimate(_estimator(task.apply), task.params, _chunks(rows, protocol), key=key)


def _chunks(rows: Batch, protocol: Protocol) -> list[Batch]:
    return list(batches(rows, min(protocol.chunk, len(rows.inputs))))


def _grid(**axes: tuple) -> tuple[Setting, ...]:
    points = itertools.product(*axes.values())
    return tuple(dict(zip(axes, point, strict=True)) for point in points)


METHODS: dict[str, Method] = {
    "fine-tune": Method(_by_row("fine-tune"), _grid(rate=(0.01, 0.03, 0.1, 0.15))),
    "gradient ascent": Method(_by_row("gradient ascent"), _grid(rate=(3e-5, 1e-4, 2e-4, 5e-4))),
    "random label": Method(
        _by_row("random label"), _grid(rate=(0.003, 0.01), forget_weight=(0.01, 0.1))
    ),
    "SalUn": Method(_by_row("SalUn"), _grid(rate=(0.003, 0.01), forget_weight=(0.01, 0.1))),
    "l1-sparse": Method(_by_row("l1-sparse"), _grid(rate=(0.03, 0.1), strength=(1e-4, 1e-3))),
    "UAM": Method(_by_row("UAM"), _grid(rate=(0.01, 0.03), radius=(0.3, 1.0))),
    "ROSU": Method(_by_row("ROSU"), _grid(rate=(0.01, 0.03), radius=(0.3, 1.0))),
    "GU": Method(_by_row("GU (leaf)", objective=GA()), _grid(rate=(1e-5, 3e-5, 1e-4, 3e-4))),
    "engram": Method(_engram, _grid(strength=("adaptive",), scale=(0.5, 1.0, 1.5, 2.0))),
    "K-FADE": Method(_kfade, _grid(budget=(1e-3, 1e-2, 3e-2, 0.1), damping=(0.1,))),
}
# Where a class asks for other settings than random rows do: too weak or destructive at all above.
CLASS_GRIDS: dict[str, tuple[Setting, ...]] = {
    "gradient ascent": _grid(rate=(2e-5, 4e-5, 5e-5, 7e-5)),
    "UAM": _grid(rate=(0.02, 0.03), radius=(0.7, 1.0)),
    "ROSU": _grid(rate=(0.02, 0.03), radius=(0.7, 1.0)),
}
