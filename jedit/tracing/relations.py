"""Which axes of an equation's operands are axes of its outputs, primitive by primitive.

An axis of an operand *is* an axis of an output when the output's entries of index i along it depend
on no entries of the operand but those of index i. Lengths play no part in it: rows of a matrix
product are rows of its left operand, also where its right operand has as many. A primitive that is
not listed relates nothing, which is always safe: what is not related counts as mixed.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from jedit.tracing import versions

Pairs = tuple[tuple[int, int], ...]

ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bessel_i0e",
        "bessel_i1e",
        "cbrt",
        "ceil",
        "clamp",
        "complex",
        "conj",
        "convert_element_type",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "igamma",
        "igammac",
        "imag",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "population_count",
        "pow",
        "real",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)
REDUCTIONS = frozenset(
    [
        "argmax",
        "argmin",
        "reduce_and",
        "reduce_max",
        "reduce_min",
        "reduce_or",
        "reduce_prod",
        "reduce_sum",
        "reduce_xor",
    ]
)
CUMULATIVE = frozenset(["cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"])
WINDOWS = frozenset(
    ["reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"]
)
MATRICES = frozenset(["cholesky", "eigh", "lu", "qr", "svd", "triangular_solve"])


class Place(NamedTuple):
    """The place of an index in an array: `(i // inner) % size` of the index i along `axis`."""

    axis: int
    inner: int
    size: int


class Relation(NamedTuple):
    """The axes of an operand that are axes of an output.

    Attributes:
        pairs: (operand's axis, output's axis) of axes where each entry depends on its own alone.
        near: (operand's axis, output's axis) of axes where an entry also depends on entries beside
            its own, as a convolution's along its space.
        reshaped: the shapes before and after a reshape that follows the pairs; None: none does.
    """

    pairs: Pairs = ()
    near: Pairs = ()
    reshaped: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def to_output(self, place: Place, *, with_near: bool = False) -> Place | None:
        """Return where an operand's index stands in the output; None where it is lost."""
        pairs = self.pairs + self.near if with_near else self.pairs
        found = next((place._replace(axis=b) for a, b in pairs if a == place.axis), None)
        if found is None or self.reshaped is None:
            return found
        return _relocated(found, *self.reshaped)

    def to_operand(self, place: Place, *, with_near: bool = False) -> Place | None:
        """Return where an output's index stands in the operand; None where it is no index of it."""
        found: Place | None = place
        if self.reshaped is not None:
            found = _relocated(place, *self.reshaped[::-1])
        pairs = self.pairs + self.near if with_near else self.pairs
        return found and next((found._replace(axis=a) for a, b in pairs if b == found.axis), None)


Relations = Mapping[tuple[int, int], Relation]  # by operand and output


def relate(eqn, counted: Mapping[int, int]) -> Relations:
    """Return how the axes of an equation's operands are those of its outputs.

    Args:
        eqn: the equation, of any primitive.
        counted: for a gather, the columns of its indices that count along one of their axes (the
            `arange` of `x[arange(n), picked]`), and which.

    Returns:
        A relation for each pair of an operand and an output that share some axis.
    """
    name = eqn.primitive.name
    if name == "gather":
        return _gather(eqn, counted)
    if name in ELEMENTWISE or name in versions.IDENTITY or name in versions.NO_GRADIENT:
        return _elementwise(eqn)
    rule = _RULES.get(name)
    return {} if rule is None else rule(eqn)


def _relocated(place: Place, old: tuple[int, ...], new: tuple[int, ...]) -> Place | None:
    """Return an index's place after a reshape; None where it does not lie in one axis."""
    # Row-major: the place is digit (flat // stride) % size of the flat index, and so it is after
    # the reshape, where it must lie within the digits of one new axis.
    stride = place.inner * math.prod(old[place.axis + 1 :])
    if not math.prod(old):
        return None
    for axis, length in enumerate(new):
        suffix = math.prod(new[axis + 1 :])
        if stride % suffix == 0 and (suffix * length) % (stride * place.size) == 0:
            return Place(axis, stride // suffix, place.size)
    return None


def _shapes(eqn) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [v.aval.shape for v in eqn.invars], [v.aval.shape for v in eqn.outvars]


def _equal(pairs: Iterable[tuple[int, int]], old, new) -> Pairs:
    """Return the pairs of axes of equal length: an axis that was broadcast, or cut, is another."""
    return tuple((int(a), int(b)) for a, b in pairs if old[a] == new[b])


def _same(shape, skipped: Iterable[int] = ()) -> Relation:
    skipped = set(skipped)
    return Relation(tuple((i, i) for i in range(len(shape)) if i not in skipped))


def _elementwise(eqn) -> Relations:
    ins, outs = _shapes(eqn)
    if len(outs) == len(ins) > 1:  # an identity of several arrays
        return {(k, k): _same(shape) for k, shape in enumerate(ins)}
    return _all_outputs(eqn, ())  # an axis of one entry may be broadcast


def _all_outputs(eqn, skipped: Iterable[int]) -> Relations:
    """Relate equal axes of all operands and outputs, but those skipped or of another length."""
    (ins, outs), skipped = _shapes(eqn), set(skipped)
    return {
        (k, j): Relation(_equal(_same(old, skipped).pairs, old, new))
        for (k, old), (j, new) in itertools.product(enumerate(ins), enumerate(outs))
        if len(old) == len(new)
    }


def _reshape(eqn) -> Relations:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    order = eqn.params["dimensions"]  # a transpose before it
    order = range(len(old)) if order is None else order
    pairs = tuple((int(a), b) for b, a in enumerate(order))
    return {(0, 0): Relation(pairs, reshaped=(tuple(old[a] for a in order), new))}


def _transpose(eqn) -> Relations:
    return {(0, 0): Relation(tuple((int(a), b) for b, a in enumerate(eqn.params["permutation"])))}


def _broadcast(eqn) -> Relations:
    pairs = enumerate(eqn.params["broadcast_dimensions"])
    return {(0, 0): Relation(_equal(pairs, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape))}


def _squeeze(eqn) -> Relations:
    rank = len(eqn.invars[0].aval.shape)
    gone = {int(d) % rank for d in eqn.params["dimensions"]}
    return {(0, 0): Relation(tuple((a, b) for b, a in _numbered(rank, gone)))}


def _expand_dims(eqn) -> Relations:
    rank = len(eqn.outvars[0].aval.shape)
    new = {int(d) % rank for d in eqn.params["dimensions"]}
    return {(0, 0): Relation(tuple(_numbered(rank, new)))}


def _numbered(rank: int, without: Iterable[int]) -> Iterable[tuple[int, int]]:
    without = set(without)
    return enumerate(i for i in range(rank) if i not in without)


def _reduce(eqn) -> Relations:
    kept = list(_numbered(len(eqn.invars[0].aval.shape), map(int, eqn.params["axes"])))
    relation = Relation(tuple((a, b) for b, a in kept))
    return {(k, j): relation for k in range(len(eqn.invars)) for j in range(len(eqn.outvars))}


def _cumulative(eqn) -> Relations:
    axis = int(eqn.params["axis"])
    return {(0, 0): _same(eqn.invars[0].aval.shape, (axis,))._replace(near=((axis, axis),))}


def _windows(eqn) -> Relations:
    (old, *_), (new, *_) = _shapes(eqn)
    params = eqn.params
    fixed = zip(
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["base_dilation"],
        params["window_dilation"],
        strict=True,
    )
    # A window of one entry that neither moves nor pads leaves its axis strictly as it was.
    still = {i for i, window in enumerate(fixed) if window == (1, 1, (0, 0), 1, 1)}
    strict = _equal(((i, i) for i in still), old, new)
    near = _equal(((i, i) for i in range(len(old)) if i not in still), old, new)
    return {(0, 0): Relation(strict, near)}


def _dot_general(eqn) -> Relations:
    (contract, batch), (ins, _) = eqn.params["dimension_numbers"], _shapes(eqn)
    found: dict[tuple[int, int], Relation] = {}
    # The output's axes are the batch, then the left operand's free axes, then the right one's.
    start = len(batch[0])
    for k in (0, 1):
        bound = {*contract[k], *batch[k]}
        free = [i for i in range(len(ins[k])) if i not in bound]
        pairs = [(a, b) for b, a in enumerate(batch[k])]
        pairs += [(a, start + b) for b, a in enumerate(free)]
        found[k, 0] = Relation(tuple((int(a), b) for a, b in pairs))
        start += len(free)
    return found


def _ragged_dot(eqn) -> Relations:
    """Relate the rows alone: which matrix multiplies a row, only the sizes of the groups say."""
    (left, right, *_), _ = _shapes(eqn)
    if (len(left), len(right)) != (2, 3):
        return {}
    return {(0, 0): Relation(((0, 0),))}


def _conv(eqn) -> Relations:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    (left, right), (out,) = _shapes(eqn)
    found = {}
    # Batch groups mix the examples with the output's features; then nothing is claimed of the left.
    if params["batch_group_count"] == 1:
        batch = ((int(numbers.lhs_spec[0]), int(numbers.out_spec[0])),)
        space = [
            (a, b)
            for a, b, stride, dilation in zip(
                numbers.lhs_spec[2:],
                numbers.out_spec[2:],
                params["window_strides"],
                params["lhs_dilation"],
                strict=True,
            )
            if stride == dilation == 1
        ]
        found[0, 0] = Relation(batch, _equal(space, left, out))
    found[1, 0] = Relation(_equal(((numbers.rhs_spec[0], numbers.out_spec[1]),), right, out))
    return found


def _slice(eqn) -> Relations:
    (old, *_), (new,) = _shapes(eqn)
    return {(0, 0): Relation(_equal(_same(old).pairs, old, new))}


def _update_slice(eqn) -> Relations:
    """Relate the update's axes of whole length: a window as long as its axis begins at zero."""
    (old, update, *_), (new,) = _shapes(eqn)
    return {(0, 0): _same(old), (1, 0): Relation(_equal(_same(update).pairs, update, new))}


def _split(eqn) -> Relations:
    return _all_outputs(eqn, (int(eqn.params["axis"]),))


def _concatenate(eqn) -> Relations:
    return _all_outputs(eqn, (int(eqn.params["dimension"]),))


def _pad(eqn) -> Relations:
    # Even padding at the end alone would keep the indices; it is rare, and a claim less is safe.
    moved = {i for i, config in enumerate(eqn.params["padding_config"]) if any(config)}
    return {(0, 0): _same(eqn.invars[0].aval.shape, moved)}


def _rev(eqn) -> Relations:
    return {(0, 0): _same(eqn.invars[0].aval.shape, map(int, eqn.params["dimensions"]))}


def _sort(eqn) -> Relations:
    return _all_outputs(eqn, (int(eqn.params["dimension"]),))


def _top_k(eqn) -> Relations:
    axis = eqn.params.get("axis", eqn.params.get("reduction_dimension", -1))
    return _all_outputs(eqn, (int(axis) % len(eqn.invars[0].aval.shape),))


def _fft(eqn) -> Relations:
    rank = len(eqn.invars[0].aval.shape)
    return _all_outputs(eqn, range(rank - len(eqn.params["fft_lengths"]), rank))


def _matrices(eqn) -> Relations:
    """Relate the leading axes of stacked matrices, each of which is decomposed by itself."""
    ins, outs = _shapes(eqn)
    # The last two axes are the matrix; results such as `eigh`'s values have one axis less.
    lead = min(len(shape) for shape in ins) - 2
    pairs = tuple((i, i) for i in range(lead))
    return {
        (k, j): Relation(_equal((p for p in pairs if p[1] < len(new)), old, new))
        for (k, old), (j, new) in itertools.product(enumerate(ins), enumerate(outs))
    }


def _gather(eqn, counted: Mapping[int, int]) -> Relations:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (operand, indices), (out,) = _shapes(eqn)
    places = [i for i in range(len(out)) if i not in numbers.offset_dims]
    place = dict(enumerate(places))
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [i for i in range(len(operand)) if i not in gone]
    pairs = [(a, b) for a, b in zip(windows, numbers.offset_dims, strict=True)]
    # A window over a whole axis must begin at zero, whatever the indices say: it cannot move.
    pairs = [(a, b) for a, b in pairs if sizes[a] == operand[a]]
    for a, b in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        pairs.append((a, place[b]))
    # `x[arange(n), picked]` takes entry i of this axis for output i: as if the axis were a batch.
    for column, a in enumerate(numbers.start_index_map):
        if a in numbers.collapsed_slice_dims and column in counted:
            pairs += _equal([(a, place[counted[column]])], operand, out)
    pairs = [(int(a), int(b)) for a, b in pairs]
    return {(0, 0): Relation(tuple(pairs)), (1, 0): Relation(tuple(place.items()))}


def _scatter(eqn) -> Relations:
    numbers = eqn.params["dimension_numbers"]
    (operand, _, updates), _ = _shapes(eqn)
    places = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = [i for i in range(len(operand)) if i not in gone]
    # An update's axis is the operand's only where no index moves it and it is written whole.
    from_updates = [
        (u, a)
        for a, u in zip(windows, numbers.update_window_dims, strict=True)
        if a not in numbers.scatter_dims_to_operand_dims and updates[u] == operand[a]
    ]
    # The updates' axes outside the windows are those of the indices, in order, less the last.
    batch = (numbers.scatter_indices_batching_dims, numbers.operand_batching_dims)
    from_indices = tuple(zip(*batch, strict=True))
    from_updates += [(places[i], a) for i, a in from_indices]
    related = (tuple((int(i), int(a)) for i, a in pairs) for pairs in (from_indices, from_updates))
    return {(0, 0): _same(operand), **{(k, 0): Relation(r) for k, r in enumerate(related, 1)}}


_RULES: dict[str, Callable[..., Relations]] = {
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(CUMULATIVE, _cumulative),
    **dict.fromkeys(WINDOWS, _windows),
    **dict.fromkeys(MATRICES, _matrices),
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max"),
        _scatter,
    ),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _slice,
    "dynamic_update_slice": _update_slice,
    "expand_dims": _expand_dims,
    "fft": _fft,
    "pad": _pad,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "top_k": _top_k,
    "transpose": _transpose,
}
