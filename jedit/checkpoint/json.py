"""Edits and curvatures as plain JSON beside their arrays, and back.

What is written are the fields of a closed set of classes, by one function for all of them. Reading
is a function for each class, which checks everything it meets. Nothing is found by a name from the
file.
"""

from collections.abc import Mapping
from typing import Any, get_args

import jax
import numpy as np

from jedit.checkpoint.arrays import describe, described, is_shape
from jedit.checkpoint.sealed import DamagedError, check_fields, shown
from jedit.curvature.low_rank import num_values
from jedit.curvature.types import By, Curvature, Diagonal, Factor, Kronecker
from jedit.edits import Edit, LowRank
from jedit.tracing.sites import Weight

MAX_OPS = 64  # relayouts of one weight; a scan in a scan has fewer than ten
MAX_NAME = 4096
Shape = tuple[int, ...]
FIELDS: dict[type, tuple[str, ...]] = {
    Edit: ("blocks",),
    LowRank: ("left", "right", "weight"),
    Curvature: ("blocks", "factors", "num_outputs"),
    Kronecker: ("weight", "input", "output", "corrected", "is_merged"),
    Diagonal: ("weight", "values"),
    Factor: ("matrix", "basis", "eigenvalues", "by"),
    Weight: (
        *("path", "shape", "ops", "layers", "is_stacked", "d_in", "d_out"),
        *("bias_path", "bias_shape", "bias_ops"),
    ),
}
# Of what may be one of several classes the file says which, by a word and not by a class's name.
WORDS = {LowRank: "low rank", Kronecker: "kronecker", Diagonal: "diagonal"}


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """Return an edit's blocks, in their order, without the numbers in them."""
    return {
        "blocks": [
            [path, _to_json(x) if isinstance(x, LowRank) else {"dense": describe(x)}]
            for path, x in edit.blocks.items()
        ]
    }


def edit_from_json(value: Any, source: str) -> Edit:
    """Read what `edit_to_json` wrote, with a `ShapeDtypeStruct` for each array.

    Raises:
        DamagedError: the value is no edit.
    """
    check_fields(value, FIELDS[Edit], source)
    blocks = {}
    for path, block in pairs(value["blocks"], source):
        at = f"{source}: {path}"
        kind, fields = _tagged(block, at)
        if kind == "dense":
            blocks[path] = described(fields, at)
        elif kind == "low rank":
            check_fields(fields, FIELDS[LowRank], at)
            left, right = (described(fields[name], at) for name in ("left", "right"))
            weight = _weight_from_json(fields["weight"], at)
            lead = left.shape[:-3]
            sizes = (weight.layers, weight.d_in, weight.layers, weight.d_out)
            right_sizes = len(left.shape) >= 3 and len(right.shape) == len(left.shape)
            if (
                not right_sizes
                or (*left.shape[-3:-1], right.shape[-3], right.shape[-1]) != sizes
                or (right.shape[:-3], right.shape[-2]) != (lead, left.shape[-1])
                or (left.dtype, weight.path, weight.bias_path) != (right.dtype, path, None)
            ):
                raise DamagedError(f"{at}: {left.shape} and {right.shape} make no {weight}")
            blocks[path] = _bare(LowRank, left, right, weight)
        else:
            raise DamagedError(f"{at}: is a {shown(kind)}; known are 'dense' and 'low rank'")
    return Edit(blocks)


def curvature_to_json(curvature: Curvature) -> dict[str, Any]:
    """Return a curvature's blocks and factors, in their order, without the numbers in them."""
    return _to_json(curvature)


def curvature_from_json(value: Any, source: str) -> Curvature:
    """Read what `curvature_to_json` wrote, with a `ShapeDtypeStruct` for each array.

    Raises:
        DamagedError: the value is no curvature.
    """
    check_fields(value, FIELDS[Curvature], source)
    factors = {
        name: _factor_from_json(x, f"{source}: {name}")
        for name, x in pairs(value["factors"], source)
    }
    blocks = {}
    for name, block in pairs(value["blocks"], source):
        at = f"{source}: {name}"
        kind, fields = _tagged(block, at)
        if kind == "diagonal":
            check_fields(fields, FIELDS[Diagonal], at)
            weight = _weight_from_json(fields["weight"], at)
            blocks[name] = _bare(Diagonal, weight, described(fields["values"], at))
            _check_sides(blocks[name].values, weight, at)
        elif kind == "kronecker":
            check_fields(fields, FIELDS[Kronecker], at)
            weight = _weight_from_json(fields["weight"], at)
            names = (fields["input"], fields["output"])
            sides = (weight.rows, weight.d_out)
            for factor, side in zip(names, sides, strict=True):
                if type(factor) is not str or factor not in factors:
                    raise DamagedError(f"{at}: there is no factor {shown(factor)}")
                if factors[factor].dimension != side:
                    raise DamagedError(f"{at}: the factor {factor} has another side than {side}")
                if (number := _num_layers(factors[factor])) != weight.layers:
                    raise DamagedError(
                        f"{at}: the factor {factor} has {number} layers, its weight {weight.layers}"
                    )
            corrected = None
            if fields["corrected"] is not None:
                corrected = described(fields["corrected"], at)
                pair = (factors[name] for name in names)
                counts = (num_values(factor.basis, factor.dimension) for factor in pair)
                _check_sides(corrected, weight, at, *counts)
            if type(merged := fields["is_merged"]) is not bool:
                raise DamagedError(f"{at}: is_merged is {shown(merged)}, no truth value")
            blocks[name] = _bare(Kronecker, weight, *names, corrected, None, merged)
        else:
            raise DamagedError(f"{at}: is a {shown(kind)}; known are 'diagonal' and 'kronecker'")
    return _bare(Curvature, blocks, factors, described(value["num_outputs"], source))


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):  # before the numbers: Python's truth values are some
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, tuple | list):
        return [_to_json(x) for x in value]
    if isinstance(value, Mapping):
        # JSON's objects are written with their names sorted; the order of blocks is part of them.
        return [[name, _to_json(x)] for name, x in value.items()]
    if type(value) not in FIELDS:
        return describe(value)
    fields = {name: _to_json(getattr(value, name)) for name in FIELDS[type(value)]}
    return {WORDS[type(value)]: fields} if type(value) in WORDS else fields


def _factor_from_json(value: Any, source: str) -> Factor:
    check_fields(value, FIELDS[Factor], source)
    matrix, basis, eigenvalues = (
        None if value[name] is None else described(value[name], source)
        for name in ("matrix", "basis", "eigenvalues")
    )
    if value["by"] not in get_args(By):
        raise DamagedError(f"{source}: by is {shown(value['by'])}; known are {get_args(By)}")
    shapes = tuple(None if x is None else tuple(x.shape) for x in (matrix, basis, eigenvalues))
    if not _make_a_factor(*shapes):
        raise DamagedError(f"{source}: arrays of shapes {shapes} make no factor")
    factor = _bare(Factor, matrix, basis, eigenvalues, value["by"])
    if (factor.form == "undecomposed") != (factor.by != "eigh"):
        raise DamagedError(
            f"{source}: by is {shown(factor.by)}, but its arrays make a factor {factor.form!r}"
        )
    return factor


def _make_a_factor(matrix: Shape | None, basis: Shape | None, eigenvalues: Shape | None) -> bool:
    """Say whether three shapes are those of one of the four forms of a factor."""
    if matrix is None:
        if basis is None or eigenvalues is None or len(basis) != 3:
            return False
        layers, d, k = basis
        return 0 < k < d and eigenvalues == (layers, 1 + k)
    if len(matrix) == 2:
        return basis is None and eigenvalues == matrix
    if len(matrix) != 3 or matrix[1] != matrix[2]:
        return False
    if eigenvalues is None:
        return basis is None
    return basis == matrix and eigenvalues == matrix[:2]


def _weight_from_json(value: Any, source: str) -> Weight:
    check_fields(value, FIELDS[Weight], source)
    numbers = [value[name] for name in ("layers", "d_in", "d_out")]
    paths = [value["path"], value["bias_path"] or ""]
    if (
        not is_shape(numbers)
        or 0 in numbers
        or not is_shape(value["shape"])
        or not is_shape(value["bias_shape"])
        or type(value["is_stacked"]) is not bool
        or any(type(x) is not str or len(x) > MAX_NAME for x in paths)
        or value["bias_path"] == ""
    ):
        raise DamagedError(f"{source}: {shown(value)} is no weight")
    shapes = {name: tuple(value[name]) for name in ("shape", "bias_shape")}
    ops = {name: _ops_from_json(value[name], source) for name in ("ops", "bias_ops")}
    weight = Weight(**{**value, **shapes, **ops})
    leaves = {weight.path: jax.ShapeDtypeStruct(weight.shape, "float32")}
    if weight.bias_path is not None:
        leaves[weight.bias_path] = jax.ShapeDtypeStruct(weight.bias_shape, "float32")
    try:
        jax.eval_shape(weight.gather, leaves)
    except (TypeError, ValueError, IndexError, ArithmeticError, AssertionError) as error:
        # What JAX says of shapes that do not fit, and of lengths beyond what it can count.
        raise DamagedError(f"{source}: its relayouts do not fit its shape: {error}") from None
    return weight


def _ops_from_json(value: Any, source: str) -> tuple[tuple, ...]:
    if type(value) is not list or len(value) > MAX_OPS:
        raise DamagedError(f"{source}: {shown(value)} are no relayouts")
    return tuple(_op_from_json(op, source) for op in value)


def _op_from_json(value: Any, source: str) -> tuple:
    rest: list[Any]
    name, *rest = value if type(value) is list and value else [None]
    one, three = len(rest) == 1, len(rest) == 3
    if name in ("transpose", "reshape") and one and is_shape(rest[0]):
        return (name, tuple(rest[0]))
    if name == "layer" and one and is_shape(rest):
        return (name, rest[0])
    if name == "slice" and three and all(is_shape(x) for x in rest[:2]):
        strides = rest[2]
        if strides is None or is_shape(strides):
            bounds = (tuple(x) for x in rest[:2])
            return (name, *bounds, None if strides is None else tuple(strides))
    raise DamagedError(f"{source}: {shown(value)} is no relayout")


def pairs(value: Any, source: str) -> list[tuple[str, Any]]:
    """Read names, each once, with what they name: lists of two, which keep their order.

    Raises:
        DamagedError: the value is something else.
    """
    right = type(value) is list and all(
        type(pair) is list
        and len(pair) == 2
        and type(pair[0]) is str
        and 0 < len(pair[0]) <= MAX_NAME
        for pair in value
    )
    if not right or len({pair[0] for pair in value}) < len(value):
        raise DamagedError(f"{source}: {shown(value)} are no names, each once, with what they name")
    return [(pair[0], pair[1]) for pair in value]


def _tagged(value: Any, source: str) -> tuple[str, Any]:
    if type(value) is not dict or len(value) != 1:
        raise DamagedError(f"{source}: {shown(value)} is no block")
    return next(iter(value.items()))


def _num_layers(factor: Factor) -> int:
    held = factor.basis if factor.matrix is None else factor.matrix
    assert held is not None  # a factor without a matrix is its basis
    return held.shape[0]


def _check_sides(
    values: Any, weight: Weight, source: str, rows: int | None = None, columns: int | None = None
) -> None:
    """Refuse values that are not those of a weight, or of as many rows and columns as are said.

    Layers are compared too: arithmetic would broadcast one of them to many.

    Raises:
        DamagedError: they have another shape.
    """
    sides = (weight.layers, rows or weight.rows, columns or weight.d_out)
    if values.shape[-3:] != sides:
        raise DamagedError(f"{source}: {values.shape} are no values of a {weight}")


def _bare(cls: Any, *fields: Any) -> Any:
    """Return an instance whose arrays are still shapes, which its constructor would refuse."""
    empty = object.__new__(cls)
    for name, value in zip(cls.__dataclass_fields__, fields, strict=True):
        object.__setattr__(empty, name, value)
    return empty
