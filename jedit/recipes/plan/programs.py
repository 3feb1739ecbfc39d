"""The programs of an edit, compiled for shapes: their temporary memory and their flops.

What a compiled program holds beside its arguments is known to the compiler alone, so it is asked:
the programs that `estimate`, `unlearn` and `kfade` run are traced on shapes and compiled, and
nothing is computed. Flops are those of the matrix products, counted in the program before the
compiler has seen it.

A model's layers are alike. Each adds the same activations, the same gradient and the same products
to a program, and what one layer works with is given back before the next begins, so that memory
and flops are linear in the number of layers, but where the moment at which most is held changes
from one with few to one with many: it is then a maximum of two lines. Hence programs are compiled
for two depths, neither of them small, and the line through these is followed to the model's own.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import places_of, row_sharding
from jedit.core.paths import parameter_paths
from jedit.core.precision import wide_dtype
from jedit.curvature import (
    Curvature,
    Estimator,
    Factor,
    Factorize,
    Inverted,
    Kronecker,
    factored,
    inverted,
    kfac,
    quadratic_form,
)
from jedit.curvature.inverted import inverse_names
from jedit.curvature.likelihoods import Categorical
from jedit.curvature.mesh import blocked
from jedit.curvature.mesh.placement import along
from jedit.geometry.parts import Part, moved, part_of, with_part
from jedit.methods import natural
from jedit.objectives import GA, Objective
from jedit.objectives.token_nll import counted_kl, counted_nll, masked_mean
from jedit.recipes.plan.factors import INVERSE_STEPS, bytes_of
from jedit.requests import Natural
from jedit.training import TrainingMethod
from jedit.training.freezing import split, which_are_trained
from jedit.training.masters import with_masters
from jedit.training.steps import Program, Read, traced
from jedit.transforms import falling

# Without LLVM's optimisation, which no buffer's size depends on, a compilation takes half the time.
CPU_OPTIONS = {"xla_backend_optimization_level": 0}


class Cost(NamedTuple):
    """What a program needs beside its arguments.

    Attributes:
        bytes: temporary memory and results that overwrite no argument, on a device.
        flops: floating-point operations of its matrix products, on all devices together.
    """

    bytes: int
    flops: float

    def at(self, depth: int, other: "Cost", other_depth: int, wanted: int) -> "Cost":
        """Follow the line from this cost, through another, to a wanted depth."""
        if depth == other_depth:
            return self
        part = (wanted - depth) / (other_depth - depth)
        found = [max(a + part * (b - a), 0.0) for a, b in zip(self, other, strict=True)]
        return Cost(round(found[0]), found[1])


class Model(NamedTuple):
    """A model in shapes, and the sets that it is edited by.

    Attributes:
        apply: `apply(params, inputs) -> outputs`.
        params: shapes of the parameters, with their places.
        rows: `rows(number) -> Batch`, shapes of so many rows.
    """

    apply: Apply
    params: PyTree
    rows: Callable[[int], Batch]


def rows_of(length: int, mesh: Any = None) -> Callable[[int], Batch]:
    """Return a function that makes shapes of rows of tokens, split over a mesh's axis "data"."""

    def rows(number: int) -> Batch:
        place = None
        if mesh is not None:
            parts = mesh.shape.get("data", 1)
            # Rows that the devices do not divide are held by all of them.
            split = "data" if parts > 1 and number % parts == 0 else None
            place = NamedSharding(mesh, PartitionSpec(split))
        dtypes = (jnp.int32, jnp.int32, jnp.bool_, jnp.bool_)
        shapes: list[Any] = [
            jax.ShapeDtypeStruct((number, length), dtype, sharding=place) for dtype in dtypes
        ]
        return Batch(*shapes)

    return rows


def masters_of(apply: Apply, params: PyTree, select: str) -> tuple[Apply, PyTree]:
    """Return what `with_masters` does, of shapes."""
    found: list[Apply] = []

    def wide(params: PyTree) -> PyTree:
        narrowed, masters = with_masters(apply, params, which_are_trained(params, select))
        found.append(narrowed)
        return masters

    placed = jax.tree.map(
        lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
        jax.eval_shape(wide, params),
        params,
    )
    return found[0], placed


def cost_of(program: jax.stages.Traced, backend: str) -> Cost:
    """Compile a program for its shapes, on a backend such as "cpu"; return what it needs."""
    options: dict[str, Any] = CPU_OPTIONS if backend == "cpu" else {}
    memory = program.lower().compile(compiler_options=options).memory_analysis()
    assert memory is not None
    kept = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    return Cost(memory.temp_size_in_bytes + kept, flops_of(program.jaxpr.jaxpr))


def flops_of(jaxpr: Any) -> float:
    """Return the flops of a program's matrix products and solves; a loop's as often as it runs."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("cholesky", "triangular_solve"):
            total += _solver_flops(eqn)
            continue
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            over = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * over * math.prod(eqn.outvars[0].aval.shape)
            continue
        inner = [flops_of(body) for value in eqn.params.values() for body in _programs_in(value)]
        # Of the branches of a `cond` one is run; a `while` is an inverse's iteration.
        both = max(inner, default=0.0) if eqn.primitive.name == "cond" else sum(inner)
        times = {"scan": eqn.params.get("length", 1), "while": INVERSE_STEPS}
        total += both * times.get(eqn.primitive.name, 1)
    return total


def _solver_flops(eqn: Any) -> float:
    """Return the flops of Cholesky's factors, d³ / 3, or of a triangular solve, d² a column."""
    *_, d = shape = eqn.invars[0].aval.shape
    if eqn.primitive.name == "cholesky":
        return math.prod(shape) * d / 3
    return float(d * math.prod(eqn.invars[1].aval.shape))


def _programs_in(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [body for item in value for body in _programs_in(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers that the programs depend on, beside the model.

    Attributes:
        select: regular expression of the parameters that are edited.
        forget: number of forget rows.
        retain: number of retain rows.
        batch_size: rows of a step.
        chunk: rows of a pass of the curvature, those that it sees at most.
        priced: rows of a pass of the price.
        every: natural steps between two looks.
        factorize: how factors are kept.
    """

    select: str
    forget: int
    retain: int
    batch_size: int
    chunk: int
    priced: int
    every: int
    factorize: Factorize


def _estimator(model: Model, sizes: Sizes) -> Estimator:
    return kfac(model.apply, Categorical(), select=sizes.select, factorize=sizes.factorize)


def curvature_of(model: Model, sizes: Sizes) -> tuple[Any, Curvature]:
    """Return the shapes of K-FAC's sums, and of the curvature that is made of them."""
    estimator = _estimator(model, sizes)
    assert estimator.planned is not None
    return estimator.planned(model.params, model.rows(sizes.chunk))


def fit(model: Model, sizes: Sizes) -> jax.stages.Traced:
    """Return the pass of the curvature over one batch."""
    estimator = _estimator(model, sizes)
    state, _ = curvature_of(model, sizes)
    rows = model.rows(sizes.chunk)
    return jax.jit(estimator.update, donate_argnums=0).trace(
        state, model.params, rows, jax.eval_shape(lambda: jax.random.key(0))
    )


def price(model: Model, sizes: Sizes) -> jax.stages.Traced:
    """Return a measurement of the retain KL of a change, on one batch."""

    def measured(params: PyTree, change: Part, rows: Batch) -> Any:
        return masked_mean(*counted_kl(model.apply, params, moved(params, change), rows))

    change = changed(model, sizes.select)
    return jax.jit(measured).trace(model.params, change, model.rows(sizes.priced))


def edited(model: Model, select: str) -> dict[str, Any]:
    """Return the shapes of the parameters that are edited."""
    chosen = which_are_trained(model.params, select)
    named = zip(parameter_paths(model.params), chosen, strict=True)
    return {path: x for (path, x), is_chosen in named if is_chosen}


def changed(model: Model, select: str) -> dict[str, Any]:
    """Return the shapes of a change of the parameters that are edited."""
    return {
        path: jax.ShapeDtypeStruct(x.shape, wide_dtype(x.dtype), sharding=x.sharding)
        for path, x in edited(model, select).items()
    }


def natural_step(model: Model, sizes: Sizes) -> jax.stages.Traced:
    """Return so many natural steps as lie between two looks."""
    how, (_, curvature) = Natural(), curvature_of(model, sizes)
    optimizer = falling(how.predicted_kl, sizes.every)

    def method(curvature: Curvature) -> TrainingMethod:
        return natural(how.objective, curvature, predicted_kl=optimizer)

    return _steps(model, sizes, method, curvature, sizes.every)


def attack_step(model: Model, sizes: Sizes, *, steps: int, lessons: int) -> jax.stages.Traced:
    """Return the steps of a relearning attack: Adam's, of all parameters."""

    def taught(
        apply: Apply, params: PyTree, forget: Batch, retain: Any = None, reference: Any = None
    ) -> Any:
        del retain, reference
        return masked_mean(*counted_nll(apply, params, forget)), {}

    method = TrainingMethod(taught, optax.adam(1e-5), batch_size=8)
    sets = (model.rows(lessons),)
    return _steps(model, sizes, lambda _: method, None, steps, sets=sets)


def _steps(
    model: Model,
    sizes: Sizes,
    make: Callable[[Any], TrainingMethod],
    curvature: Curvature | None,
    steps: int,
    *,
    sets: tuple[Batch, ...] = (),
) -> jax.stages.Traced:
    """Return the compiled loop of `unlearn` for a method; the curvature is an argument of it."""
    method, params = make(curvature), model.params
    sets = sets or (model.rows(sizes.forget), model.rows(sizes.retain))
    is_trained = which_are_trained(params, method.trainable)
    trained = split(params, is_trained)
    state = jax.eval_shape(lambda c, t: make(c).optimizer.init(t), curvature, trained)
    state = _placed_state(state, curvature, trained)

    def objective(params: PyTree, drawn: tuple, reference: PyTree) -> Any:
        return method.objective(model.apply, params, *drawn, reference)

    over = tuple(row_sharding(rows) for rows in sets)
    program = Program(
        objective, method.optimizer, None, is_trained, places_of((trained, state)), over
    )
    size = sizes.batch_size if curvature is not None else method.batch_size
    streams = tuple(
        jax.ShapeDtypeStruct((steps, min(size, rows.inputs.shape[0])), jnp.int32) for rows in sets
    )
    return traced(program, trained, state, Read(params, params, sets), streams)


def _placed_state(state: PyTree, curvature: Curvature | None, trained: PyTree) -> PyTree:
    """Return an optimizer's state where `unlearn` has it: as its curvature and parameters lie."""
    like = jax.tree.structure(trained)

    def is_known(node: Any) -> bool:
        return isinstance(node, Curvature | Inverted) or jax.tree.structure(node) == like

    def placed(node: Any) -> Any:
        if isinstance(node, Curvature):
            return curvature
        if isinstance(node, Inverted):
            assert curvature is not None  # that it is the inverse of
            return _placed_inverse(node, curvature)
        if jax.tree.structure(node) != like:
            return node
        return jax.tree.map(
            lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), node, trained
        )

    return jax.tree.map(placed, state, is_leaf=is_known)


def _placed_inverse(inverse: Inverted, curvature: Curvature) -> Inverted:
    """Return the inverse of a curvature where `inverted` has it: cut along all axes of a mesh."""
    part = inverse.decomposed
    blocks = {name: curvature.blocks[name] for name in part.blocks}
    factors = {name: curvature.factors[name] for name in part.factors}
    inverses = dict(inverse.inverses)
    for name, keys in inverse_names(curvature, inverse.absolute).items():
        block = curvature.blocks[name]
        assert isinstance(block, Kronecker)  # a diagonal has its eigenvectors
        for dim, key in enumerate(keys, 1):
            values = inverses[key].values
            if block.sharding is not None and values.ndim == 4:
                place = blocked.place_of_rows(along(block.sharding, dim))
                values = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)
            inverses[key] = dataclasses.replace(inverses[key], values=values)
    return dataclasses.replace(
        inverse,
        blocks={**inverse.blocks, **blocks},
        decomposed=Curvature(blocks, factors, curvature.num_outputs),
        inverses=inverses,
    )


def gradient(model: Model, sizes: Sizes, objective: Objective = GA()) -> jax.stages.Traced:  # noqa: B008
    """Return K-FADE's gradient of one batch, added to those of the batches before."""
    change = changed(model, sizes.select)

    def added(params: PyTree, change: Part, forget: Batch, retain: Batch, total: Part) -> Any:
        current = moved(params, change)

        def lowered(part: Part) -> Any:
            return objective(model.apply, with_part(current, part), forget, retain, params)

        part = part_of(current, change)
        (value, _), found = jax.value_and_grad(lowered, has_aux=True)(part)
        return value, jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, found)

    rows = model.rows(sizes.batch_size)
    return jax.jit(added, donate_argnums=4).trace(model.params, change, rows, rows, change)


def quadratic(model: Model, sizes: Sizes) -> jax.stages.Traced:
    """Return K-FADE's predicted price of a direction, by the curvature."""
    _, curvature = curvature_of(model, sizes)
    return jax.jit(quadratic_form).trace(curvature, changed(model, sizes.select))


def inverse_bytes(curvature: Curvature) -> int:
    """Return the bytes on a device of the inverses of all factors without eigenvectors."""
    shapes = jax.eval_shape(functools.partial(inverted, damping=1.0), curvature)
    sides = _placed_inverse(shapes, curvature).inverses.values()
    return sum(bytes_of(side.values) for side in sides)


def inversion(curvature: Curvature) -> jax.stages.Traced | None:
    """Return the inversion of the longest factor without eigenvectors; None: all have some."""
    longest = None
    for name in inverse_names(curvature):
        block = curvature.blocks[name]
        assert isinstance(block, Kronecker)  # a diagonal has its eigenvectors
        for dim, end in enumerate((block.input, block.output), 1):
            factor = curvature.factors[end]
            if longest is None or factor.dimension > longest[0].dimension:
                longest = (factor, block.sharding, dim)
    if longest is None:
        return None
    factor, sharding, dim = longest
    matrix = factor.matrix
    assert matrix is not None  # an "undecomposed" factor is its matrix
    level = jax.ShapeDtypeStruct(matrix.shape[:1], matrix.dtype)

    def inverse(factor: Factor, level: Any) -> Any:
        return factored.inverse(factor, level, sharding, dim)

    return jax.jit(inverse).trace(factor, level)
