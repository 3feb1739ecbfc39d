"""What one equation does to a parameter: a site, a constant factor or shift, or a reason to refuse."""

import dataclasses
import math
from typing import Any

import numpy as np

from jedit.capture.provenance import Provenance
from jedit.capture.sites import Axes, Patches, Site, Weight
from jedit.capture.source import source_line


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where an equation stands: the scans around it, the innermost `cond` branch, the call's line."""

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
        host: for a bias, the site whose output it is added to.
        bias_layout: for a bias, how it would stand in the host's weight.
        tap: index of its probe in the plan.
    """

    site: Site
    reads: int | None
    parameters: tuple[int, ...]
    view: "View | None" = None
    host: "Draft | None" = None
    bias_layout: tuple | None = None
    tap: int = -1

    def with_bias(self, bias: "Draft") -> Site:
        """The site with that bias as the last row of its matrix."""
        path, shape, ops, scale = bias.bias_layout
        weight = dataclasses.replace(
            self.site.weight, bias_path=path, bias_shape=shape, bias_ops=ops
        )
        return dataclasses.replace(self.site, weight=weight, bias_scale=scale)


@dataclasses.dataclass(frozen=True)
class View:
    """A site's output after relayouts. One label an axis: None (position), or a sortable feature key."""

    draft: Draft
    labels: tuple[tuple | None, ...]
    shape: tuple[int, ...]

    def after(self, name: str, eqn) -> "View | None":
        """The view after a relayout; None where features and positions would be mixed."""
        shape = eqn.outvars[0].aval.shape
        if name == "transpose":
            labels = tuple(self.labels[i] for i in eqn.params["permutation"])
        elif name in ("reshape", "squeeze", "expand_dims"):
            labels = _regroup(self.labels, self.shape, shape)
        elif name in ("convert_element_type", "reduce_precision"):
            labels = self.labels
        else:
            labels = None
        return None if labels is None else View(self.draft, labels, shape)

    def accepts(self, bias: Provenance) -> bool:
        """Whether the bias varies along exactly the feature axes, in the weight's own order."""
        keys = [label for label in self.labels if label is not None]
        return (
            keys == sorted(keys)
            and len(bias.view) == len(self.labels)
            and all(
                (n == 1 and (label is None or core is None)) or (label is None) == (core is None)
                for label, core, n in zip(self.labels, bias.view, self.shape, strict=True)
            )
            and all(m in (1, n) for m, n in zip(bias.shape, self.shape, strict=True))
        )


def _regroup(labels, old, new) -> tuple | None:
    """Labels after a reshape: axes are matched in groups of equal size; a mixed group is given up."""
    out: list[tuple | None] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        size_old, size_new = 1, 1
        while True:
            if size_old == size_new and (i > i0 or j > j0):
                break
            if size_old <= size_new and i < len(old):
                size_old, i = size_old * old[i], i + 1
            elif j < len(new):
                size_new, j = size_new * new[j], j + 1
            else:
                return None
        keys = [labels[k] for k in range(i0, i) if old[k] != 1]
        if not keys:
            out += [None] * (j - j0)
        elif all(k is None for k in keys):
            out += [None] * (j - j0)
        elif all(k is not None for k in keys) and keys == sorted(keys):
            out += [(*keys[0], k) if new[j0 + k] != 1 else None for k in range(j - j0)]
        else:
            return None
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
        ops=(*origin.ops, *ops),
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
    wc, ac, wb, ab = tuple(contract[w]), tuple(contract[a]), tuple(batch[w]), tuple(batch[a])
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
    first, second = range(nb, nb + len(a_free)), range(nb + len(a_free), nb + len(a_free + w_free))
    if a == 1:
        first, second = range(nb + len(w_free), nb + len(w_free + a_free)), range(nb, nb + len(w_free))
    axes_out = Axes(
        (*layers, *(n + i for i in range(nb)), *(n + i for i in first), *uses)
        + tuple(n + i for i in second),
        len(layers) + nb,
        len(a_free) + len(uses),
    )
    site = _site(eqn, scope, origin, "dense", weight, axes_in, axes_out, eqn.invars[a])
    labels: list[tuple | None] = [None] * len(eqn.outvars[0].aval.shape)
    for i in range(nb):
        labels[i] = (0, i)
    for k, i in enumerate(second):
        labels[i] = (1, k)
    draft = Draft(site, a, (w,))
    draft.view = View(draft, tuple(labels), eqn.outvars[0].aval.shape)
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
        ("transpose", tuple(numbers.rhs_spec)),
        ("reshape", (groups, d_out, d_in)),
        ("transpose", (0, 2, 1)),
    )
    extra = (groups,) if groups > 1 else ()
    weight = _matrix_weight(origin, scope, ops, extra, d_in, d_out)
    kinds = tuple("layer" if d in layers else "use" for d in range(len(scope.lengths)))
    patches = Patches(
        lhs_spec=tuple(numbers.lhs_spec),
        out_spec=tuple(numbers.out_spec),
        window=tuple(space),
        strides=tuple(params["window_strides"]),
        padding=tuple(tuple(p) for p in params["padding"]),
        lhs_dilation=tuple(params["lhs_dilation"]),
        rhs_dilation=tuple(params["rhs_dilation"]),
        groups=groups,
        scan_axes=kinds,
    )
    site = _site(eqn, scope, origin, "conv", weight, patches, patches, eqn.invars[0])
    out_shape = eqn.outvars[0].aval.shape
    labels = tuple((1, 0) if i == numbers.out_spec[1] else None for i in range(len(out_shape)))
    draft = Draft(site, 0, (1,))
    draft.view = View(draft, labels, out_shape)
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
    batch = tuple(numbers.operand_batching_dims)
    rows = tuple(numbers.collapsed_slice_dims)
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
    index_batch = tuple(numbers.start_indices_batching_dims)
    last = len(indices.aval.shape) - 1
    index_free = tuple(i for i in range(last) if i not in index_batch)
    axes_in = Axes(
        (*layers, *(n + i for i in index_batch), *(n + i for i in index_free), *uses, n + last),
        len(layers) + len(batch),
        len(index_free) + len(uses),
    )
    offset = tuple(numbers.offset_dims)
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
    start = tuple(
        int(np.clip(s, 0, n - k)) for s, n, k in zip(starts, shape, sizes, strict=True)
    )
    limit = tuple(s + k for s, k in zip(start, sizes, strict=True))
    return origin.sliced(start, limit, None) or "is sliced after a broadcast"


def _elementwise(eqn, values, scope) -> Draft | Provenance | str:
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if all(v.origin is not None for v in values):
        return f"enters `{name}` with another parameter"
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
        if not isinstance(draft, str):
            _offer_as_bias(draft, other.view, origin.scaled(sign))
        return draft
    if name in ("add", "add_any", "sub"):
        return origin.scaled(sign)
    if other.constant is None:
        return "is multiplied by an array that does not depend on the inputs"
    factor = float(other.constant)
    if name == "div" and k == 1:
        return "divides a constant"
    return origin.scaled(1.0 / factor if name == "div" else factor)


def _vector_site(eqn, scope, origin, kind, reads) -> Draft | str:
    """A parameter that multiplies, or is added to, every position of an activation."""
    shape = eqn.outvars[0].aval.shape
    if reads is not None and len(eqn.invars[reads].aval.shape) != len(shape):
        return "is multiplied by an activation of another rank"
    layers, uses = _scan_axes(origin, scope)
    n = len(scope.lengths)
    features = [i for i, core in enumerate(origin.view) if core is not None]
    positions = [i for i, core in enumerate(origin.view) if core is None]
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
    draft.host = host
    ops = (*origin.feature_ops(), ("reshape", (draft.site.weight.d_out,)))
    draft.bias_layout = (origin.path, origin.leaf_shape, ops, origin.scale)
