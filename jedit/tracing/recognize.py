"""What one equation does to a parameter: sites, a constant factor, or a reason to refuse."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jedit.tracing import versions
from jedit.tracing.drafts import Draft, Offer, Scope, View
from jedit.tracing.interpreter import Step
from jedit.tracing.joined import Box, Joined, Piece, joined, pieces_of
from jedit.tracing.provenance import Provenance, simplified
from jedit.tracing.sites import Axes, Patches, Site, Weight
from jedit.tracing.source import source_line

STACKED_AROUND_A_BRANCH = "is stacked when called, and scanned with a `cond` that reads it"
BY_ARRAY = "is multiplied by an array that does not depend on the inputs"


class Multiplied(NamedTuple):
    """The parameter times an array that does not depend on the inputs."""

    origin: Provenance
    step: Step


def recognize(
    eqn, values, scope: Scope
) -> "list[Draft] | Provenance | Joined | Multiplied | str | None":
    """Decide what an equation with parameters among its operands is.

    Returns:
        Drafts of its sites, one for each leaf; a `Provenance` (or several of them joined) when the
        result is still the parameter, maybe multiplied; a sentence when the parameter cannot be
        followed; None when no operand is a parameter, or nothing is known of such an equation.
    """
    if not any(v.origin is not None for v in values):
        return None
    # The order matters: sums and constant factors are followed first, as they are what may still
    # happen to a parameter that was multiplied by an array; any other equation refuses that one.
    name = eqn.primitive.name
    if name in versions.CUSTOM_RULE:
        return LOOP_WITH_A_RULE if _holds_a_loop(eqn) else A_CUSTOM_RULE
    if name in REASONS:
        return REASONS[name]
    if name in ("add", "add_any", "sub", "mul", "div"):
        return _elementwise(eqn, values, scope)
    if name == "neg":
        return values[0].origin.scaled(-1.0)
    if any(v.factor for v in values):
        return BY_ARRAY
    if name == "dot_general":
        return _dense(eqn, values, scope)
    if name in ("concatenate", "stack"):
        return _concatenate(eqn, values, scope)
    if any(isinstance(v.origin, Joined) for v in values):
        return f"is joined with other parameters before it enters `{name}`"
    if name == "conv_general_dilated":
        return _conv(eqn, values, scope)
    if name == "gather":
        return _embedding(eqn, values, scope)
    if name == "dynamic_slice":
        return _dynamic_slice(eqn, values)
    return None


A_CUSTOM_RULE = "enters a function with a custom derivative rule"
LOOP_WITH_A_RULE = (
    "enters a `while` loop with a custom derivative rule; a bounded one is covered (Equinox's kind "
    "'bounded', Diffrax's DirectAdjoint)"
)
REASONS = {
    **dict.fromkeys(versions.RAGGED, "enters `ragged_dot`: its rows are known only at run time"),
    "while": "enters a `while` loop, which has no reverse mode",
}


def _holds_a_loop(eqn) -> bool:
    inner = [inside for closed in versions.inner_jaxprs(eqn) for inside in closed.jaxpr.eqns]
    return eqn.primitive.name == "while" or any(map(_holds_a_loop, inner))


def ints(values) -> tuple[int, ...]:
    """Return Python's integers: JAX's parameters may hold NumPy's."""
    return tuple(int(value) for value in values)


def _scan_axes(origin: Provenance, scope: Scope) -> tuple[list[int], list[int]]:
    """Return which scans' axes of a recorded array are layers of the weight, and which are uses."""
    layers = [d for d in range(len(scope.lengths)) if d in origin.layer_depths]
    return layers, [d for d in range(len(scope.lengths)) if d not in origin.layer_depths]


def _site(eqn, scope, origin, kind, weight, axes_in, axes_out, shape_in, **more) -> Site:
    """Return a site of its whole operand (of this shape; None: none is kept) and whole output."""
    _, uses = _scan_axes(origin, scope)
    shape = () if shape_in is None else (*scope.lengths, *shape_in)
    return Site(
        name=origin.path,
        kind=kind,
        weight=weight,
        record=None,
        probe=-1,
        axes_in=axes_in,
        axes_out=axes_out,
        scale=origin.scale,
        bias_scale=1.0,
        input_shape=shape,
        output_shape=(*scope.lengths, *eqn.outvars[0].aval.shape),
        output_dtype=str(eqn.outvars[0].aval.dtype),
        num_uses=math.prod(scope.lengths[d] for d in uses),
        branch=scope.branch,
        source=source_line(eqn, scope.source),
        num_scans=len(scope.lengths),
        **more,
    )


def _is_cut_around_a_branch(origin: Provenance | Joined, scope: Scope) -> bool:
    """Say whether only some iterations of a scan around the `cond` see a leaf: did *they* run?"""
    depths = [depth for piece in pieces_of(origin) for depth, _, _ in piece.layers]
    return scope.branch is not None and any(depth < scope.num_outer for depth in depths)


def _windowed(site: Site, scope: Scope, piece: Piece, box_in: Box | None, box_out: Box) -> Site:
    """Return the site cut to these parts of its operand (None: nothing is kept) and output."""
    # A scan over joined leaves records all iterations; those that see this leaf are a window too.
    cut = {depth: (start, stop) for depth, start, stop in piece.layers}

    def window(box: Box, whole: tuple[int, ...]):
        scans = tuple(cut.get(d, (0, n)) for d, n in enumerate(scope.lengths))
        wanted = (*scans, *box)
        is_all = not cut and wanted == tuple((0, n) for n in whole)
        return tuple(stop - start for start, stop in wanted), None if is_all else wanted

    output_shape, window_out = window(box_out, site.output_shape)
    site = dataclasses.replace(site, output_shape=output_shape, window_out=window_out)
    if box_in is not None:
        input_shape, window_in = window(box_in, site.input_shape)
        site = dataclasses.replace(site, input_shape=input_shape, window_in=window_in)
    if site.weight.layers == 1 and (site.window_in or site.window_out):  # stacked only here
        site = dataclasses.replace(site, weight=dataclasses.replace(site.weight, is_stacked=False))
    return site


def _matrix_weight(origin, scope, ops, extra_layers, d_in, d_out) -> Weight:
    layers, _ = _scan_axes(origin, scope)
    count = math.prod(scope.lengths[d] for d in layers) * math.prod(extra_layers)
    return Weight(
        path=origin.path,
        shape=origin.leaf_shape,
        ops=simplified((*origin.ops, *ops)),
        layers=count,
        is_stacked=bool(layers) or bool(extra_layers),
        d_in=d_in,
        d_out=d_out,
    )


def _which_is_weight(values) -> tuple[int, int] | str:
    """Return (weight operand, activation operand), or why neither is."""
    as_weight = [k for k in (0, 1) if values[k].origin and not values[k].origin.is_broadcast]
    if len(as_weight) == 2:
        return "is contracted with another parameter"
    if not as_weight:
        return "is broadcast before it is contracted"
    weight = as_weight[0]
    other = values[1 - weight]
    if other.on_params and not other.on_data and other.origin is None:
        return "is contracted with a value that depends on parameters alone"
    return weight, 1 - weight


def _dense(eqn, values, scope) -> list[Draft] | str:
    which = _which_is_weight(values)
    if isinstance(which, str):
        return which
    w, a = which
    origin = values[w].origin
    if not isinstance(origin, Joined):
        return [_dense_site(eqn, (w, a), pieces_of(origin)[0], scope)]
    if _is_cut_around_a_branch(origin, scope):
        return STACKED_AROUND_A_BRANCH
    # The views go: a bias added later spans the outputs of several leaves, and is no row of one.
    drafts = [_dense_site(eqn, (w, a), piece, scope) for piece in origin.pieces]
    return [dataclasses.replace(draft, view=None) for draft in drafts]


def _dense_site(eqn, which: tuple[int, int], piece: Piece, scope: Scope) -> Draft:
    """Return the site of one leaf, the whole of the weight or one of several that were joined."""
    w, a = which
    contract, batch = eqn.params["dimension_numbers"]
    # In the order in which they lie in the parameter, whatever order the product names them in.
    pairs = sorted(zip(ints(contract[w]), ints(contract[a]), strict=True))
    wc, ac = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    wb, ab = ints(batch[w]), ints(batch[a])
    origin = piece.origin.materialized()
    w_shape, a_shape = origin.shape, eqn.invars[a].aval.shape
    w_free = tuple(i for i in range(len(w_shape)) if i not in (*wc, *wb))
    a_free = tuple(i for i in range(len(a_shape)) if i not in (*ac, *ab))
    inside = scope.within(piece.layers)
    layers, uses = _scan_axes(origin, inside)
    n, nb = len(scope.lengths), len(wb)
    extra = tuple(w_shape[i] for i in wb)
    d_in = math.prod(w_shape[i] for i in wc)
    d_out = math.prod(w_shape[i] for i in w_free)
    ops = (("transpose", (*wb, *wc, *w_free)), ("reshape", (math.prod(extra), d_in, d_out)))
    weight = _matrix_weight(origin, inside, ops, extra, d_in, d_out)
    axes_in = Axes(
        (*layers, *(n + i for i in ab), *(n + i for i in a_free), *uses, *(n + i for i in ac)),
        len(layers) + nb,
        len(a_free) + len(uses),
    )
    # The output's axes: batch, then the free axes of the left operand, then of the right one.
    start_a, start_w = (nb, nb + len(a_free)) if a == 0 else (nb + len(w_free), nb)
    positions = range(start_a, start_a + len(a_free))
    features = range(start_w, start_w + len(w_free))
    axes_out = Axes(
        (*layers, *(n + i for i in range(nb)), *(n + i for i in positions), *uses)
        + tuple(n + i for i in features),
        len(layers) + nb,
        len(a_free) + len(uses),
    )
    box_in = [(0, size) for size in a_shape]
    box_out = [(0, size) for size in eqn.outvars[0].aval.shape]
    # A leaf meets the part of the operand along its own box's contracted axes, and makes the part
    # of the output along its free ones.
    for axis, k in (*zip(ac, wc, strict=True), *zip(ab, wb, strict=True)):
        box_in[axis] = piece.box[k]
    for axis, k in (*enumerate(wb), *zip(features, w_free, strict=True)):
        box_out[axis] = piece.box[k]
    site = _site(eqn, inside, origin, "dense", weight, axes_in, axes_out, a_shape)
    site = _windowed(site, scope, piece, tuple(box_in), tuple(box_out))
    draft = Draft(site, a)
    draft.view = View.of_output(draft, eqn.outvars[0].aval.shape, (*range(nb), *features))
    return draft


def _concatenate(eqn, values, scope) -> list[Draft] | Joined | str:
    """Join parameters among themselves; beside an activation each is a bias, added to nothing."""
    shapes = [atom.aval.shape for atom in eqn.invars]
    origins = [value.origin for value in values]
    axis = int(eqn.params["axis" if eqn.primitive.name == "stack" else "dimension"])
    if eqn.primitive.name == "stack":
        shapes = [(*shape[:axis], 1, *shape[axis:]) for shape in shapes]
        pairs = zip(origins, shapes, strict=True)
        origins = [None if origin is None else origin.reshaped(shape) for origin, shape in pairs]
        if any(new is None and v.origin for new, v in zip(origins, values, strict=True)):
            return "is stacked after a broadcast"
    whole = joined(origins, shapes, axis)
    if not any(v.on_data and v.origin is None for v in values):
        return whole
    return _vector_sites(eqn, scope, whole, "bias", None)


def _conv(eqn, values, scope) -> list[Draft] | str:
    which = _which_is_weight(values)
    if isinstance(which, str):
        return which
    if which[0] != 1:
        return "is the left operand of a convolution"
    params = eqn.params
    if params["batch_group_count"] != 1:
        return "enters a convolution with batch groups"
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    origin = values[1].origin.materialized()
    shape = eqn.invars[1].aval.shape
    out, channels, *space = (shape[i] for i in numbers.rhs_spec)
    d_in, d_out = channels * math.prod(space), out // groups
    layers, _ = _scan_axes(origin, scope)
    # (O, I, window...) -> (groups, O/groups, I·window) -> (groups, I·window, O/groups)
    ops = (
        ("transpose", ints(numbers.rhs_spec)),
        ("reshape", (groups, d_out, d_in)),
        ("transpose", (0, 2, 1)),
    )
    extra = (groups,) if groups > 1 else ()
    weight = _matrix_weight(origin, scope, ops, extra, d_in, d_out)
    kinds = tuple("layer" if d in layers else "use" for d in range(len(scope.lengths)))
    patches = Patches(
        lhs_spec=ints(numbers.lhs_spec),
        out_spec=ints(numbers.out_spec),
        window=tuple(space),
        strides=ints(params["window_strides"]),
        padding=tuple((int(low), int(high)) for low, high in params["padding"]),
        lhs_dilation=ints(params["lhs_dilation"]),
        rhs_dilation=ints(params["rhs_dilation"]),
        groups=groups,
        scan_axes=kinds,
    )
    shape_in = eqn.invars[0].aval.shape
    site = _site(eqn, scope, origin, "conv", weight, patches, patches, shape_in)
    draft = Draft(site, 0)
    draft.view = View.of_output(draft, eqn.outvars[0].aval.shape, numbers.out_spec[1:2])
    return [draft]


def _embedding(eqn, values, scope) -> list[Draft] | str:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, indices = eqn.invars
    origin = values[0].origin
    if origin is None or values[1].origin is not None:
        return "is used as an index"
    if origin.is_broadcast:
        return "is broadcast before it is indexed"
    origin = origin.materialized()
    shape = table.aval.shape
    batch = ints(numbers.operand_batching_dims)
    mapped = ints(numbers.start_index_map)
    mode = str(eqn.params["mode"]).rsplit(".", maxsplit=1)[-1]
    # Whole axes may be indexed as well (`vmap` of `table[i]`): clipped, that index is always zero.
    rows = tuple(i for i in mapped if sizes[i] != shape[i])
    if not rows:  # a table of one row
        rows = tuple(i for i in mapped if i in numbers.collapsed_slice_dims) or mapped[:1]
    features = tuple(i for i in range(len(shape)) if i not in (*rows, *batch))
    is_lookup = (
        len(rows) == 1
        and sizes[rows[0]] == 1
        and all(sizes[i] == shape[i] for i in features)
        and (len(mapped) == 1 or mode == "CLIP")
    )
    if not is_lookup:
        return "is indexed by something other than whole rows"
    layers, uses = _scan_axes(origin, scope)
    n = len(scope.lengths)
    extra = tuple(shape[i] for i in batch)
    d_in, d_out = shape[rows[0]], math.prod(shape[i] for i in features)
    ops = (("transpose", (*batch, *rows, *features)), ("reshape", (math.prod(extra), d_in, d_out)))
    weight = _matrix_weight(origin, scope, ops, extra, d_in, d_out)
    index_batch = ints(numbers.start_indices_batching_dims)
    last = len(indices.aval.shape) - 1
    index_free = tuple(i for i in range(last) if i not in index_batch)
    axes_in = Axes(
        (*layers, *(n + i for i in index_batch), *(n + i for i in index_free), *uses, n + last),
        len(layers) + len(batch),
        len(index_free) + len(uses),
    )
    # A gather puts the features at `offset_dims` and the axes of its indices, in order, elsewhere.
    offset = ints(numbers.offset_dims)
    others = [i for i in range(len(eqn.outvars[0].aval.shape)) if i not in offset]
    place = dict(zip(range(last), others, strict=True))
    axes_out = Axes(
        (*layers, *(n + place[i] for i in index_batch), *(n + place[i] for i in index_free), *uses)
        + tuple(n + i for i in offset),
        len(layers) + len(batch),
        len(index_free) + len(uses),
    )
    shape_in = indices.aval.shape
    site = _site(eqn, scope, origin, "embedding", weight, axes_in, axes_out, shape_in)
    column = mapped.index(rows[0])
    return [Draft(dataclasses.replace(site, index_mode=mode, index_column=column), 1)]


def _dynamic_slice(eqn, values) -> Provenance | str:
    """Follow a slice whose start is known as a plain one; one chosen at run time is refused."""
    origin, starts = values[0].origin, [v.constant for v in values[1:]]
    if origin is None or any(s is None for s in starts):
        return "is sliced at an index known only at run time"
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    # XLA moves a slice that would reach over the end back inside.
    start = tuple(int(np.clip(s, 0, n - k)) for s, n, k in zip(starts, shape, sizes, strict=True))
    limit = tuple(s + k for s, k in zip(start, sizes, strict=True))
    return origin.sliced(start, limit, None) or "is sliced after a broadcast"


def _elementwise(eqn, values, scope) -> list[Draft] | Provenance | Joined | Multiplied | str | None:
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if all(v.origin is not None for v in values):
        is_same = values[0].origin.paths == values[1].origin.paths
        return f"enters `{name}` with {'itself' if is_same else 'another parameter'}"
    k = 0 if values[0].origin is not None else 1
    other, origin = values[1 - k], values[k].origin
    if origin.shape != shape:
        dims = tuple(range(len(shape))) if len(origin.shape) == len(shape) else ()
        if len(origin.shape) not in (0, len(shape)):
            return f"enters `{name}` with an operand of another rank"
        origin = origin.broadcast(shape, dims)
    sign = -1.0 if name == "sub" and k == 1 else 1.0
    if other.on_data:
        if name == "div":
            return "divides, or is divided by, an activation"
        if name == "mul":
            return _vector_sites(eqn, scope, origin, "scale", 1 - k)
        origin = origin.scaled(sign)
        if values[k].factor:  # times an array, then added: that array is what it scales
            return _vector_sites(eqn, scope, origin, "scale", None)
        drafts = _vector_sites(eqn, scope, origin, "bias", None)
        is_negated = name == "sub" and k == 0  # b - y negates y
        if isinstance(drafts, list) and isinstance(origin, Provenance) and not is_negated:
            _offer_as_bias(drafts[0], other.view, origin)
        return drafts
    # What depends on no input moves a parameter by a constant: its derivative is the same.
    if name in ("add", "add_any", "sub"):
        return origin.scaled(sign)
    if other.constant is None:
        is_divisor = name == "div" and k == 1
        if is_divisor or not isinstance(origin, Provenance):
            return "is a divisor" if is_divisor else BY_ARRAY
        return Multiplied(origin, Step(eqn, 1 - k))
    factor = float(other.constant)
    if name == "mul":
        return origin.scaled(factor)
    if k == 1 or factor == 0.0:
        return "divides a constant" if k == 1 else "is divided by zero"
    return origin.scaled(1.0 / factor)


def _vector_sites(eqn, scope, origin, kind, reads) -> list[Draft] | str:
    """Return the sites of parameters that multiply, or are added to, every position."""
    if _is_cut_around_a_branch(origin, scope):
        return STACKED_AROUND_A_BRANCH
    return [_vector_site(eqn, scope, piece, kind, reads) for piece in pieces_of(origin)]


def _vector_site(eqn, scope, piece: Piece, kind, reads) -> Draft:
    """Return the site of one leaf; its output, and what it reads, have the box's shape."""
    origin, inside = piece.origin, scope.within(piece.layers)
    shape = origin.shape
    layers, uses = _scan_axes(origin, inside)
    n = len(scope.lengths)
    # An axis of length one is a position: whether it was broadcast must not depend on the batch.
    features = [i for i, core in enumerate(origin.view) if core is not None and shape[i] != 1]
    positions = [i for i in range(len(shape)) if i not in features]
    axes = Axes(
        (*layers, *(n + i for i in positions), *uses, *(n + i for i in features)),
        len(layers),
        len(positions) + len(uses),
    )
    d_out = math.prod(shape[i] for i in features)
    base = dataclasses.replace(origin, ops=origin.feature_ops())
    weight = _matrix_weight(base, inside, (("reshape", (1, d_out)),), (), 1, d_out)
    is_scale = kind == "scale"  # a bias reads nothing, a scale the other factor
    shape_in = None
    if is_scale:
        shape_in = eqn.outvars[0].aval.shape if reads is None else eqn.invars[reads].aval.shape
    site = _site(eqn, inside, origin, kind, weight, axes if is_scale else None, axes, shape_in)
    box_in = None
    if shape_in is not None:  # it may have axes of length one, or no axes
        parts = zip(shape_in, piece.box, strict=bool(shape_in))
        box_in = tuple((0, 1) if size == 1 else part for size, part in parts)
    return Draft(_windowed(site, scope, piece, box_in, piece.box), reads)


def _offer_as_bias(draft: Draft, view: View | None, origin: Provenance) -> None:
    if view is None or not view.accepts(origin):
        return
    host = view.draft
    # Weight and bias must be sliced by the same scans, or they have different numbers of layers.
    if tuple(op[1] for op in host.site.weight.ops if op[0] == "layer") != origin.layer_depths:
        return
    ops = simplified((*origin.feature_ops(), ("reshape", (draft.site.weight.d_out,))))
    draft.offer = Offer(host, origin.path, origin.leaf_shape, ops, origin.scale)
