"""One table of promises: every public transform and method that edits is a row of it.

An exception is written in the row, with its reason. Methods that train and objectives have theirs
in `test_contract_training`, which also sees to it that nothing public is left out.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Factor, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import stack_requests
from jedit.edits import apply_edit, sum_edits
from jedit.geometry import null_space
from jedit.methods import (
    Ascent,
    Associations,
    Layers,
    alphaedit,
    curvature_engram,
    curvature_pruning,
    engram,
    kfade,
    memit,
    memorised_subspace,
    rome,
    ucan,
)
from jedit.objectives import LatentMeans
from jedit.requests import batch_unlearn
from jedit.steering import fold, identity, lineas
from jedit.transforms import (
    Adapter,
    add_constraint_gradient,
    add_l1_gradient,
    clip_by_curvature_norm,
    finetune_modules,
    ignore_top_fraction,
    mask_to_salient,
    natural_steps,
    orthogonalize_to_retain,
    project_out_stored,
    project_realised_update,
    project_to_null_space,
    retain_neutral_surrogate,
    scale_by_curvature,
    shrink_top_directions,
    train_adapters,
    unlearn_first,
    with_update_args,
)


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax's own Adam mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@dataclass(frozen=True)
class Row:
    """A transform (from a curvature) or a method (from a scene), and what it is excused from."""

    name: str
    make: Callable
    excused: dict[str, str] = field(default_factory=dict)
    extras: Callable = field(default=lambda _: {})


def _retain_grads(params):
    return {"retain_grads": jax.tree.map(lambda p: jnp.cos(p) + 0.5, params)}


def _constraint(params):
    return {**_retain_grads(params), "retain_loss": jnp.asarray(0.7)}


def _retain_grad_fn(params):
    del params
    return {"retain_grad_fn": lambda p: jax.tree.map(lambda x: jnp.cos(x) + 0.5, p)}


def _surrogate(params):
    return {
        "forget_grads": jax.tree.map(lambda p: jnp.sin(3 * p), params),
        "grad_fn": lambda p: jax.tree.map(lambda x: x + x**3, p),
    }


def _stored(params):
    """One direction, of length one over all leaves."""
    size = sum(p.size for p in jax.tree.leaves(params)) ** -0.5
    wide = lambda p: jnp.promote_types(p.dtype, jnp.float32)  # noqa: E731
    return {"stored": jax.tree.map(lambda p: jnp.full((1, *p.shape), size, wide(p)), params)}


def _unlearnt(params, curvature):
    del params
    forget_grad_fn = lambda p: jax.tree.map(jnp.sin, p)  # noqa: E731
    return {**_surrogate({}), "curvature": curvature, "forget_grad_fn": forget_grad_fn}


def _adapters(curvature):
    a = np.linspace(-1.0, 1.0, 8, dtype=np.float32).reshape(1, 4, 2)
    b = np.linspace(0.3, 2.0, 12, dtype=np.float32).reshape(1, 2, 6)
    # In another library's loop the first layer has another name.
    name, block = next(iter(curvature.blocks.items()))
    return {name: Adapter(block.weight.kernel, jnp.asarray(a), jnp.asarray(b))}


def _undecomposed(curvature, by):
    """The curvature as it is kept without eigenvectors."""
    factors = {n: Factor(f.matrix, None, None, by) for n, f in curvature.factors.items()}
    return dataclasses.replace(curvature, factors=factors)


# Of "w" most, of "v" and "b" nothing is among the largest two fifths.
SALIENCY = {
    "w": np.linspace(1.0, 2.0, 24).reshape(4, 6),
    "b": np.zeros(6),
    "v": np.linspace(-0.5, 0.5, 18).reshape(6, 3),
}
MOVES_ALL = {"frozen": "it changes updates of all parameters and freezes none"}
TRANSFORMS = [
    Row("scale_by_curvature", lambda c: scale_by_curvature(c, damping=0.1)),
    Row(
        "clip_by_curvature_norm",
        lambda c: clip_by_curvature_norm(c, predicted_kl=1e-3),
        {"frozen": "it scales the whole update by one factor and freezes nothing"},
    ),
    Row("natural_steps", lambda c: natural_steps(c, damping=0.1)),
    Row(
        "scale_by_curvature, by Cholesky",
        lambda c: scale_by_curvature(_undecomposed(c, "cholesky"), damping=0.1),
    ),
    Row(
        "natural_steps, by products",
        lambda c: natural_steps(_undecomposed(c, "inverse"), damping=0.1),
    ),
    Row("shrink_top_directions", lambda c: shrink_top_directions(c, share=0.5)),
    Row("project_to_null_space", lambda c: project_to_null_space(null_space(c, threshold=0.2))),
    Row("project_realised_update", lambda c: project_realised_update(null_space(c, threshold=0.2))),
    Row("orthogonalize_to_retain", lambda _: orthogonalize_to_retain(2), MOVES_ALL, _retain_grads),
    Row(
        "orthogonalize_to_retain in Adam's metric",
        lambda _: orthogonalize_to_retain(2, metric="adam", scope="global", refresh=2),
        MOVES_ALL,
        _retain_grads,
    ),
    Row(
        "orthogonalize_to_retain in a curvature's metric",
        lambda c: orthogonalize_to_retain(2, metric=c, damping=0.3),
        MOVES_ALL,
        _retain_grads,
    ),
    Row(
        "orthogonalize_to_retain, frequent directions",
        lambda _: orthogonalize_to_retain(2, sketch="frequent_directions", scope="global"),
        MOVES_ALL | {"vmap": "several batched eigh in one program can deadlock on CPU"},
        _retain_grads,
    ),
    Row(
        "retain_neutral_surrogate",
        lambda _: retain_neutral_surrogate(0.1, outer="amplify"),
        MOVES_ALL | {"multi steps": "optax.MultiSteps takes arrays alone as extra arguments"},
        _surrogate,
    ),
    Row("ignore_top_fraction", lambda _: ignore_top_fraction(0.3), MOVES_ALL),
    Row("mask_to_salient", lambda _: mask_to_salient(SALIENCY, 0.4)),
    Row("add_constraint_gradient", lambda _: add_constraint_gradient(0.3), MOVES_ALL, _constraint),
    Row("add_l1_gradient", lambda _: add_l1_gradient(0.1), MOVES_ALL),
    Row("project_out_stored", lambda _: project_out_stored(), MOVES_ALL, _stored),
    Row(
        "unlearn_first",
        lambda c: with_update_args(unlearn_first(optax.sgd(0.3), rate=1e-3), _unlearnt, c),
        MOVES_ALL | {"names": "it draws noise leaf by leaf, in the order that the names give them"},
    ),
    Row(
        "finetune_modules",
        lambda _: finetune_modules(
            optax.sgd(0.3), r"^w$|hidden\S*(kernel|weight|w)\b", every=1, tuning_steps=2
        ),
        {
            **MOVES_ALL,
            "multi steps": "optax.MultiSteps takes arrays alone as extra arguments",
        },
        _retain_grad_fn,
    ),
    Row("train_adapters", lambda c: train_adapters(optax.sgd(0.3), _adapters(c), scale=0.7)),
]
METHODS = [
    Row("kfade by budget", lambda *scene: kfade(*scene, budget=0.05, ascent=Ascent(2))),
    Row("kfade by step", lambda *scene: kfade(*scene, ascent=Ascent(2, step_size=1e-2))),
    Row(
        "kfade, by Cholesky",
        lambda f, p, c, *sets: kfade(f, p, _undecomposed(c, "cholesky"), *sets, budget=0.05),
    ),
    Row("batch_unlearn", lambda *scene: (sum_edits(_stack(*scene)), None)),
    Row(
        "batch_unlearn, by products",
        lambda f, p, c, *sets: (sum_edits(_stack(f, p, _undecomposed(c, "inverse"), *sets)), None),
    ),
    Row("engram", lambda _, p, c, *sets: engram(p, c, c)),  # noqa: ARG005
    Row("ucan", lambda _, p, c, forget, retain: ucan(p, _of(p, forget), c)),  # noqa: ARG005
    Row("curvature_engram", lambda _, p, c, *sets: curvature_engram(p, c, c)),  # noqa: ARG005
    Row(
        "memorised_subspace",
        lambda f, p, c, forget, _: memorised_subspace(p, _of(p, forget), c, share=0.5),  # noqa: ARG005
    ),
    Row("curvature_pruning", lambda _, p, c, *sets: curvature_pruning(p, c)),  # noqa: ARG005
    Row("lineas", lambda f, p, _, *sets: _lineas(f, p, *sets)),
    Row("rome", lambda f, p, c, forget, _: rome(f, p, c, Associations(forget), None, layer="w")),
    Row(
        "memit",
        lambda f, p, c, forget, _: memit(f, p, c, Associations(forget), None, layers=Layers("w")),
    ),
    Row(
        "alphaedit",
        lambda f, p, c, forget, _: alphaedit(
            f, p, null_space(c, threshold=0.2), Associations(forget), None, layers=Layers("w")
        ),
    ),
]


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


@dataclass(frozen=True)
class FeatureAttention:
    """What stands for a network's attention: a softmax over features, which it hides one by one."""

    def __call__(self, apply, params, x):
        del apply
        return jax.nn.softmax(x @ params["w"] @ params["w"].T, axis=-1)[None]

    def without(self, apply, params, x, position):
        is_kept = jnp.arange(x.shape[-1]) != position
        return apply(params, jnp.where(is_kept[None], x, 0))


def _lineas(apply, params, forget, retain):
    start = identity(apply, params, forget.inputs, ["w"], is_foldable=True)
    learnt, info = lineas(apply, params, forget, retain, start=start, steps=3)
    return fold(apply, params, forget.inputs, learnt), info


def make_latents(params, known, unknown):
    """Latents of the network's hidden layer, not sparse."""
    hidden = lambda x: jnp.tanh(x @ params["w"])  # noqa: E731
    strange, familiar = (jnp.mean(hidden(batch.inputs), axis=0) for batch in (unknown, known))
    distance = jnp.mean(jnp.sum((hidden(known.inputs) - strange[None]) ** 2, axis=-1))
    return LatentMeans(lambda states: states, strange, familiar, distance)


ESTIMATOR = kfac(network, Categorical(), select="w|b")  # one, so that it compiles once


def _stack(apply, params, curvature, forget, _):
    edits, _ = batch_unlearn(apply, params, curvature, stack_requests([forget, forget]))
    return 1e-2 * edits


def _of(params, rows):
    return estimate(ESTIMATOR, params, [rows], key=jax.random.key(4))


def make_scene(key, dtype=jnp.float32):
    rng = np.random.default_rng(3)
    shapes = {"w": (4, 6), "b": (6,), "v": (6, 3)}
    params = {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(32, 4)), dtype)
    y = jnp.asarray(rng.integers(0, 3, 32))
    forget, retain = Batch(x[:8], y[:8]), Batch(x[8:], y[8:])
    return network, params, estimate(ESTIMATOR, params, [retain], key=key), forget, retain


def _rows(rows, promise):
    return pytest.mark.parametrize(
        "row", [r for r in rows if promise not in r.excused], ids=lambda r: r.name
    )


@_rows(TRANSFORMS, "stable")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transform_keeps_structure_shape_and_dtype(row, dtype, key):
    _, params, curvature, _, _ = make_scene(key, dtype)
    transform = row.make(curvature)
    state = transform.init(params)
    extras = row.extras(params)
    update = jax.jit(lambda u, s, p: transform.update(u, s, p, **extras))
    updates, after = update(params, state, params)
    describe = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)  # noqa: E731
    assert describe(updates) == describe(params)
    assert describe(after) == describe(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert describe(jax.eval_shape(transform.init, params)) == describe(state)


@_rows(TRANSFORMS, "traces once")
def test_a_transform_traces_once(row, key):
    _, params, curvature, _, _ = make_scene(key)
    transform, count = row.make(curvature), []

    @jax.jit
    def update(updates, state):
        count.append(1)
        return transform.update(updates, state, updates, **row.extras(updates))

    updates, state = params, transform.init(params)
    for _ in range(3):
        updates, state = update(updates, state)
    assert len(count) == 1


@_rows(TRANSFORMS, "composes")
def test_a_transform_composes(row, key):
    _, params, curvature, _, _ = make_scene(key)
    plain = row.make(curvature)
    extras = row.extras(params)
    expected, _ = plain.update(params, plain.init(params), params, **extras)
    wrappers = {
        "chain": optax.chain(row.make(curvature)),
        "masked": optax.masked(row.make(curvature), jax.tree.map(lambda _: True, params)),
        "inject": optax.inject_hyperparams(
            lambda rate: optax.chain(row.make(curvature), optax.scale(rate))
        )(rate=1.0),
        "multi steps": optax.MultiSteps(row.make(curvature), 1),
        "partition": optax.partition(
            {"edited": row.make(curvature), "left": optax.set_to_zero()},
            jax.tree.map(lambda _: "edited", params),
        ),
    }
    for name, transform in wrappers.items():
        if name in row.excused:
            continue
        update = jax.jit(lambda u, s, p, t=transform: t.update(u, s, p, **extras))
        out, _ = update(params, transform.init(params), params)
        for path in params:
            np.testing.assert_allclose(
                out[path], expected[path], rtol=1e-5, atol=1e-6, err_msg=name
            )


@_rows(TRANSFORMS, "extra")
def test_a_transform_accepts_unknown_extra_arguments(row, key):
    _, params, curvature, _, _ = make_scene(key)
    transform = row.make(curvature)
    state = transform.init(params)
    extras = row.extras(params)
    known, _ = transform.update(params, state, params, **extras)
    extra, _ = transform.update(params, state, params, value=1.0, something="else", **extras)
    jax.tree.map(np.testing.assert_array_equal, known, extra)


@_rows(TRANSFORMS, "vmap")
def test_a_transform_under_vmap_is_the_loop(row, key):
    _, params, curvature, _, _ = make_scene(key)
    transform = row.make(curvature)
    state = transform.init(params)
    stack = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    run = lambda u: transform.update(u, state, params, **row.extras(params))  # noqa: E731
    out, _ = jax.vmap(run)(stack)
    for i in range(3):
        one, _ = run(jax.tree.map(lambda x, i=i: x[i], stack))
        for path in params:
            np.testing.assert_allclose(out[path][i], one[path], rtol=1e-5, atol=1e-7)


@_rows(TRANSFORMS, "frozen")
def test_a_transform_freezes_what_it_does_not_cover(row, key):
    _, params, curvature, _, _ = make_scene(key)
    optimizer = optax.chain(optax.adamw(1e-2, weight_decay=0.1), row.make(curvature))
    state, moved = optimizer.init(params), params
    step = jax.jit(optimizer.update)
    for _ in range(100):
        updates, state = step(jax.tree.map(jnp.ones_like, params), state, moved)
        moved = optax.apply_updates(moved, updates)
    assert np.array_equal(moved["v"], params["v"])
    assert not np.array_equal(moved["w"], params["w"])


@_rows(METHODS, "edit")
def test_a_method_returns_an_edit_in_the_parameters_dtype_and_shape(row, key):
    scene = make_scene(key)
    edit, _ = row.make(*scene)
    params = scene[1]
    edited = apply_edit(params, edit)
    assert jax.tree.structure(edited) == jax.tree.structure(params)
    for path, p in params.items():
        assert (edited[path].shape, edited[path].dtype) == (p.shape, p.dtype)
    assert np.array_equal(edited["v"], params["v"]), "an uncovered parameter moved"
    assert not np.array_equal(edited["w"], params["w"])


@_rows(METHODS, "same")
def test_a_method_gives_the_same_result_again(row, key):
    scene = make_scene(key)
    first, second = row.make(*scene)[0], row.make(*scene)[0]
    jax.tree.map(np.testing.assert_array_equal, first, second)


@_rows(METHODS, "pure")
def test_a_method_leaves_its_inputs_alone(row, key):
    scene = make_scene(key)
    before = jax.tree.map(np.array, scene[1])
    row.make(*scene)
    jax.tree.map(np.testing.assert_array_equal, before, scene[1])
