"""What one equation does to a parameter: a site, a constant factor, or a reason to refuse."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jedit.capture.provenance import Provenance, axis_groups, simplified
from jedit.capture.sites import Axes, Patches, Site, Weight
from jedit.capture.source import source_line


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where an equation stands: the scans and the `cond` branch around it, and the call's line."""

    lengths: tuple[int, ...] = ()
    key: Any = ()
    branch: int | None = None
    source: str = ""

    def scan(self, length: int, key: Any) -> "Scope":
        """Inside a scan's body."""
        return Scope((*self.lengths, length), key, self.branch, self.source)

    def branched(self, key: Any, branch: int) -> "Scope":
        """Inside a branch."""
        return Scope(self.lengths, key, branch, self.source)

    def called_from(self, eqn) -> "Scope":
        """Inside a call: equations without a line of their own take the call's."""
        return dataclasses.replace(self, source=source_line(eqn, self.source))


@dataclasses.dataclass(eq=False)
class Draft:
    """A site in the making.

    Attributes:
        site: the site so far.
        reads: index of the operand that is its activation, None for a bias.
        parameters: indices of the operands that are the parameter.
        view: how its output was relaid since, while it may still meet its bias.
        offer: for a bias, how it would stand in the site to whose output it is added.
        tap: index of its probe in the plan.
    """

    site: Site
    reads: int | None
    parameters: tuple[int, ...]
    view: "View | None" = None
    offer: "Offer | None" = None
    tap: int = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Offer:
    """A bias as the last row of the matrix of the site `host`."""

    host: Draft
    path: str
    shape: tuple[int, ...]
    ops: tuple
    scale: float

    @property
    def row(self) -> tuple:
        """Equal for two offers that would make the same matrix of one host."""
        return (self.path, self.ops, self.scale)

    def to_site(self) -> Site:
        """The host's site with that row."""
        site = self.host.site
        weight = dataclasses.replace(
            site.weight, bias_path=self.path, bias_shape=self.shape, bias_ops=self.ops
        )
        return dataclasses.replace(site, weight=weight, bias_scale=self.scale)


@dataclasses.dataclass(frozen=True)
class View:
    """A site's output after relayouts: each axis's stride among the features, None for positions.

    The stride is counted in the weight's own order of features (batch dimensions, then the rest);
    a bias is in that order exactly when the strides are those of a row-major array.
    """

    draft: Draft
    strides: tuple[int | None, ...]
    shape: tuple[int, ...]

    @classmethod
    def of_output(cls, draft: Draft, shape: tuple[int, ...], features: Sequence[int]) -> "View":
        """A site's output, of which the axes `features` are the weight's, in its order."""
        strides: list[int | None] = [None] * len(shape)
        for k, i in enumerate(features):
            strides[i] = math.prod(shape[f] for f in features[k + 1 :])
        return cls(draft, tuple(strides), shape)

    def after(self, name: str, eqn) -> "View | None":
        """The view after a relayout; None where features and positions would be mixed."""
        shape = eqn.outvars[0].aval.shape
        if name == "transpose":
            strides = tuple(self.strides[i] for i in eqn.params["permutation"])
        elif name in ("reshape", "squeeze", "expand_dims"):
            is_plain = name != "reshape" or eqn.params["dimensions"] is None
            strides = _regroup(self.strides, self.shape, shape) if is_plain else None
        elif name in ("convert_element_type", "reduce_precision"):
            strides = self.strides
        else:
            strides = None
        return None if strides is None else View(self.draft, strides, shape)

    def accepts(self, bias: Provenance) -> bool:
        """Whether the bias varies along exactly the feature axes, in the weight's own order."""
        if bias.shape != self.shape:
            return False
        expected = 1
        for n, stride, core in reversed(
            list(zip(self.shape, self.strides, bias.view, strict=True))
        ):
            if n == 1:
                continue
            if (stride is None) != (core is None) or stride not in (None, expected):
                return False
            expected *= 1 if stride is None else n
        return True


def _regroup(strides, old, new) -> tuple | None:
    """Strides after a reshape; None where features meet positions or features out of order."""
    out: list[int | None] = []
    for before, after in axis_groups(old, new):
        axes = [i for i in before if old[i] != 1]
        if all(strides[i] is None for i in axes):
            out += [None] * len(after)
            continue
        if any(strides[i] is None for i in axes):
            return None
        if any(strides[i] != strides[j] * old[j] for i, j in itertools.pairwise(axes)):
            return None
        last = strides[axes[-1]]
        out += [last * math.prod(new[k] for k in after if k > j) for j in after]
    return tuple(out)


def recognize(eqn, values, scope: Scope) -> "Draft | Provenance | str | None":
    """Decide what an equation with parameters among its operands is.

    Returns:
        A `Draft` for a site, a `Provenance` when the result is still the parameter, a sentence when
        the parameter cannot be followed, None when no operand is a parameter.
    """
    if not any(v.origin is not None for v in values):
        return None
    name = eqn.primitive.name
    if name == "dot_general":
        return _dense(eqn, values, scope)
    if name == "conv_general_dilated":
        return _conv(eqn, values, scope)
    if name == "gather":
        return _embedding(eqn, values, scope)
    if name in ("add", "add_any", "sub", "mul", "div"):
        return _elementwise(eqn, values, scope)
    if name == "neg":
        return values[0].origin.scaled(-1.0)
    if name == "dynamic_slice":
        return _dynamic_slice(eqn, values)
    return None


def ints(values) -> tuple[int, ...]:
    """Python's integers: JAX's parameters may hold NumPy's."""
    return tuple(int(value) for value in values)


def _scan_axes(origin: Provenance, scope: Scope) -> tuple[list[int], list[int]]:
    """The recorded array's leading axes that are layers of the weight, and those that are uses."""
    layers = [d for d in range(len(scope.lengths)) if d in origin.layer_depths]
    return layers, [d for d in range(len(scope.lengths)) if d not in origin.layer_depths]


def _site(eqn, scope, origin, kind, weight, axes_in, axes_out, operand, **more) -> Site:
    _, uses = _scan_axes(origin, scope)
    shape = () if operand is None else (*scope.lengths, *operand.aval.shape)
    return Site(
        name=origin.path,
        kind=kind,
        weight=weight,
        record=None,
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
        **more,
    )


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
    """(weight operand, activation operand), or why neither is."""
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


def _dense(eqn, values, scope) -> Draft | str:
    which = _which_is_weight(values)
    if isinstance(which, str):
        return which
    w, a = which
    contract, batch = eqn.params["dimension_numbers"]
    wc, ac, wb, ab = ints(contract[w]), ints(contract[a]), ints(batch[w]), ints(batch[a])
    w_shape, a_shape = eqn.invars[w].aval.shape, eqn.invars[a].aval.shape
    w_free = tuple(i for i in range(len(w_shape)) if i not in (*wc, *wb))
    a_free = tuple(i for i in range(len(a_shape)) if i not in (*ac, *ab))
    origin = values[w].origin.materialized()
    layers, uses = _scan_axes(origin, scope)
    n, nb = len(scope.lengths), len(wb)
    extra = tuple(w_shape[i] for i in wb)
    d_in = math.prod(w_shape[i] for i in wc)
    d_out = math.prod(w_shape[i] for i in w_free)
    ops = (("transpose", (*wb, *wc, *w_free)), ("reshape", (math.prod(extra), d_in, d_out)))
    weight = _matrix_weight(origin, scope, ops, extra, d_in, d_out)
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
    site = _site(eqn, scope, origin, "dense", weight, axes_in, axes_out, eqn.invars[a])
    draft = Draft(site, a, (w,))
    draft.view = View.of_output(draft, eqn.outvars[0].aval.shape, (*range(nb), *features))
    return draft


def _conv(eqn, values, scope) -> Draft | str:
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
    site = _site(eqn, scope, origin, "conv", weight, patches, patches, eqn.invars[0])
    draft = Draft(site, 0, (1,))
    draft.view = View.of_output(draft, eqn.outvars[0].aval.shape, numbers.out_spec[1:2])
    return draft


def _embedding(eqn, values, scope) -> Draft | str:
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
    rows = ints(numbers.collapsed_slice_dims)
    features = tuple(i for i in range(len(shape)) if i not in (*rows, *batch))
    is_lookup = (
        len(rows) == 1
        and tuple(numbers.start_index_map) == rows
        and all(sizes[i] == shape[i] for i in features)
        and indices.aval.shape[-1] == 1
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
    offset = ints(numbers.offset_dims)
    others = [i for i in range(len(eqn.outvars[0].aval.shape)) if i not in offset]
    place = dict(zip(range(last), others, strict=True))
    axes_out = Axes(
        (*layers, *(n + place[i] for i in index_batch), *(n + place[i] for i in index_free), *uses)
        + tuple(n + i for i in offset),
        len(layers) + len(batch),
        len(index_free) + len(uses),
    )
    mode = str(eqn.params["mode"]).rsplit(".", maxsplit=1)[-1]
    site = _site(
        eqn, scope, origin, "embedding", weight, axes_in, axes_out, indices, index_mode=mode
    )
    return Draft(site, 1, (0,))


def _dynamic_slice(eqn, values) -> Provenance | str:
    """A slice whose start is known is a slice; one chosen at run time cannot be followed."""
    origin, starts = values[0].origin, [v.constant for v in values[1:]]
    if origin is None or any(s is None for s in starts):
        return "is sliced at an index known only at run time"
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    start = tuple(int(np.clip(s, 0, n - k)) for s, n, k in zip(starts, shape, sizes, strict=True))
    limit = tuple(s + k for s, k in zip(start, sizes, strict=True))
    return origin.sliced(start, limit, None) or "is sliced after a broadcast"


def _elementwise(eqn, values, scope) -> Draft | Provenance | str:
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if all(v.origin is not None for v in values):
        is_same = values[0].origin.path == values[1].origin.path
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
            return _vector_site(eqn, scope, origin, "scale", 1 - k)
        draft = _vector_site(eqn, scope, origin.scaled(sign), "bias", None)
        if not (name == "sub" and k == 0):  # b - y negates y
            _offer_as_bias(draft, other.view, origin.scaled(sign))
        return draft
    if name in ("add", "add_any", "sub"):
        return origin.scaled(sign)
    if other.constant is None:
        return "is multiplied by an array that does not depend on the inputs"
    factor = float(other.constant)
    if name == "mul":
        return origin.scaled(factor)
    if k == 1 or factor == 0.0:
        return "divides a constant" if k == 1 else "is divided by zero"
    return origin.scaled(1.0 / factor)


def _vector_site(eqn, scope, origin, kind, reads) -> Draft:
    """A parameter that multiplies, or is added to, every position of an activation."""
    shape = eqn.outvars[0].aval.shape
    layers, uses = _scan_axes(origin, scope)
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
    weight = _matrix_weight(base, scope, (("reshape", (1, d_out)),), (), 1, d_out)
    operand = None if reads is None else eqn.invars[reads]
    axes_in = None if reads is None else axes
    site = _site(eqn, scope, origin, kind, weight, axes_in, axes, operand)
    return Draft(site, reads, tuple(i for i in (0, 1) if i != reads))


def _offer_as_bias(draft: Draft, view: View | None, origin: Provenance) -> None:
    if view is None or not view.accepts(origin):
        return
    host = view.draft
    if tuple(op[1] for op in host.site.weight.ops if op[0] == "layer") != origin.layer_depths:
        return
    ops = simplified((*origin.feature_ops(), ("reshape", (draft.site.weight.d_out,))))
    draft.offer = Offer(host, origin.path, origin.leaf_shape, ops, origin.scale)
