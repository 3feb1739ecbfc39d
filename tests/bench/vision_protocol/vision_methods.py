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
from jedit.objectives import GA, RandomLabel, RetainNLL, relabel, with_retain
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
    forget: Batch | None = None,
) -> tuple[PyTree, float]:
    state = method.optimizer.init(task.params)
    zero = optax.tree_utils.tree_get(state, "learning_rate")
    state = optax.tree_utils.tree_set(state, learning_rate=jnp.full_like(zero, rate))
    run = functools.partial(
        unlearn,
        method._replace(batch_size=protocol.batch_size),
        task.apply,
        LoopState(0, task.params, state),
        task.forget if forget is None else forget,
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


def _trainer(build: Callable[..., TrainingMethod], *options: str) -> Callable:
    """A run of a method that its settings alone determine.

    One optimizer for one setting, so that another run compiles nothing.
    """
    build = functools.cache(build)

    def run(task, protocol, setting, key):
        method = build(*(setting[name] for name in options))
        return _trained(task, protocol, method, setting["rate"], key)

    return run


def _fine_tune():
    return TrainingMethod(RetainNLL(), SGD)


def _ascent():
    return TrainingMethod(GA(), SGD)


def _uam(radius):
    return methods.uam(SGD, radius=radius)


def _rosu(radius):
    return methods.rosu(SGD, radius=radius)


def _gu():
    method = methods.gu(GA(), learning_rate=1.0)
    scale = optax.inject_hyperparams(lambda learning_rate: optax.scale(learning_rate))
    return method._replace(optimizer=optax.chain(method.optimizer, scale(learning_rate=0.0)))


@functools.cache
def _penalised(gamma, steps):
    return methods.l1_sparse(SGD, strength=gamma, steps=steps)


def _l1_sparse(task, protocol, setting, key):
    method = _penalised(setting["gamma"], _num_steps(task, protocol))
    return _trained(task, protocol, method, setting["rate"], key)


def _random_label(task, protocol, setting, key):
    other = relabel(task.forget, NUM_CLASSES, key=jax.random.fold_in(key, 1))
    objective = with_retain(RandomLabel(), forget_weight=setting["gamma"])
    method = TrainingMethod(objective, SGD)
    return _trained(task, protocol, method, setting["rate"], key, other)


def _salun(task, protocol, setting, key):
    other = relabel(task.forget, NUM_CLASSES, key=jax.random.fold_in(key, 1))
    objective = with_retain(RandomLabel(), forget_weight=setting["gamma"])
    given = (task.apply, task.params, _chunks(task.forget, protocol), SGD)

    def prepared():
        method = methods.salun(*given, objective=objective)
        return method, method.optimizer.init(task.params)  # with the mask in it

    prepared()  # compiles
    (method, _), saliency_seconds = _timed(prepared)
    params, seconds = _trained(task, protocol, method, setting["rate"], key, other)
    return params, seconds + saliency_seconds


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
    "fine-tune": Method(_trainer(_fine_tune), _grid(rate=(0.01, 0.03, 0.1, 0.15))),
    "gradient ascent": Method(_trainer(_ascent), _grid(rate=(3e-5, 1e-4, 2e-4, 5e-4))),
    "random label": Method(_random_label, _grid(rate=(0.003, 0.01), gamma=(0.01, 0.1))),
    "SalUn": Method(_salun, _grid(rate=(0.003, 0.01), gamma=(0.01, 0.1))),
    "l1-sparse": Method(_l1_sparse, _grid(rate=(0.03, 0.1), gamma=(1e-4, 1e-3))),
    "UAM": Method(_trainer(_uam, "radius"), _grid(rate=(0.01, 0.03), radius=(0.3, 1.0))),
    "ROSU": Method(_trainer(_rosu, "radius"), _grid(rate=(0.01, 0.03), radius=(0.3, 1.0))),
    "GU": Method(_trainer(_gu), _grid(rate=(1e-5, 3e-5, 1e-4, 3e-4))),
    "engram": Method(_engram, _grid(strength=("adaptive",), scale=(0.5, 1.0, 1.5, 2.0))),
    "K-FADE": Method(_kfade, _grid(budget=(1e-3, 1e-2, 3e-2, 0.1), damping=(0.1,))),
}
# Where a class asks for other settings than random rows do: too weak or destructive at all above.
CLASS_GRIDS: dict[str, tuple[Setting, ...]] = {
    "gradient ascent": _grid(rate=(2e-5, 4e-5, 5e-5, 7e-5)),
    "UAM": _grid(rate=(0.02, 0.03), radius=(0.7, 1.0)),
    "ROSU": _grid(rate=(0.02, 0.03), radius=(0.7, 1.0)),
}
