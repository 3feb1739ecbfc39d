"""Sites: the places where an activation meets a parameter, and the matrices they stand for.

Every site, whatever its equation, is brought to one canonical form:

    a (layers, positions..., d_in)    what enters; token indices (layers, positions...) for a gather
    g (layers, positions..., d_out)   the gradient at its output
    W (layers, d_in, d_out)           the parameter, plus a last row for the bias: y = scale·a @ W

`layers` is 1 for an ordinary weight, and the product of the stacked axes for a weight that a scan
takes apart or that has batch dimensions (a mixture of experts, a vmapped ensemble, conv groups).
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jedit.core.display import html_table, text_table
from jedit.tracing.provenance import Op, apply_ops, transpose_ops, view_ops


@dataclasses.dataclass(frozen=True)
class Weight:
    """The place of a site's matrix in the parameters: hashable, and the same for every batch.

    Attributes:
        path: the parameter's path, as `jedit.core.paths.parameter_paths` names it.
        shape: the shape of the parameter's leaf.
        ops: relayouts from the leaf to (layers, d_in, d_out); to (layers, d_out) for kinds
            "scale" and "bias", whose d_in is 1.
        layers: number of independent matrices; 1 for an ordinary weight.
        is_stacked: whether the factors keep a leading axis of length `layers`.
        bias_path: the bias's path, or None.
        bias_shape: the shape of the bias's leaf.
        bias_ops: relayouts from the bias leaf to (layers, d_out).
    """

    path: str
    shape: tuple[int, ...]
    ops: tuple[Op, ...]
    layers: int
    is_stacked: bool
    d_in: int
    d_out: int
    bias_path: str | None = None
    bias_shape: tuple[int, ...] = ()
    bias_ops: tuple[Op, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the parameters this matrix is made of."""
        return (self.path,) if self.bias_path is None else (self.path, self.bias_path)

    @property
    def rows(self) -> int:
        """Return the number of the matrix's rows: d_in, and one more for a bias."""
        return self.d_in + (self.bias_path is not None)

    @property
    def kernel(self) -> "Weight":
        """Return the matrix without the bias's row."""
        return dataclasses.replace(self, bias_path=None, bias_shape=(), bias_ops=())

    @property
    def bias_row(self) -> "Weight":
        """Return the bias's row, a matrix of one row by itself; there must be a bias."""
        assert self.bias_path is not None
        return dataclasses.replace(
            self.kernel, path=self.bias_path, shape=self.bias_shape, ops=self.bias_ops, d_in=1
        )

    def gather(self, leaves: Mapping[str, Array]) -> Array:
        """Return the matrix (layers, rows, d_out) of `{path: array}`; the bias is the last row."""
        matrix = apply_ops(self.ops, leaves[self.path])
        matrix = matrix.reshape(self.layers, self.d_in, self.d_out)
        if self.bias_path is None:
            return matrix
        bias = apply_ops(self.bias_ops, leaves[self.bias_path])
        return jnp.concatenate([matrix, bias.reshape(self.layers, 1, self.d_out)], axis=1)

    def places(self, axis: int) -> np.ndarray:
        """Return where along an axis of the leaf each entry of the kernel stands.

        Cheap for leaves of any size: nothing but the axis's numbers is there, in views of them.

        Returns:
            An array that broadcasts to (layers, d_in, d_out), with axes of one where all is alike.
        """
        numbers = np.arange(self.shape[axis])
        numbers = numbers.reshape(-1, *(1,) * (len(self.shape) - axis - 1))
        found = view_ops(self.ops, np.broadcast_to(numbers, self.shape))
        found = found.reshape(self.layers, self.d_in, self.d_out)
        return found[tuple(slice(None if step else 1) for step in found.strides)]

    def scatter(self, matrix: Array) -> dict[str, Array]:
        """Put a matrix back: arrays like the parameters, zero where `gather` reads nothing."""

        def back(part, ops, shape):
            target = jax.eval_shape(
                lambda x: apply_ops(ops, x), jax.ShapeDtypeStruct(shape, matrix.dtype)
            )
            return transpose_ops(ops, part.reshape(target.shape), shape)

        leaves = {self.path: back(matrix[:, : self.d_in], self.ops, self.shape)}
        if self.bias_path is not None:
            leaves[self.bias_path] = back(matrix[:, self.d_in], self.bias_ops, self.bias_shape)
        return leaves


@dataclasses.dataclass(frozen=True)
class Axes:
    """The relayout of a captured array to (layers, positions..., features).

    It is transposed, then axes are merged: the first `num_layers` axes after the transpose are
    layers, the next `num_positions` positions.
    """

    permutation: tuple[int, ...]
    num_layers: int
    num_positions: int

    @property
    def positions(self) -> tuple[int, ...]:
        """Return the array's axes that become positions, in their order."""
        return self.permutation[self.num_layers : self.num_layers + self.num_positions]

    def canonical(self, array: Array) -> Array:
        """Return the array laid out as (layers, positions..., features)."""
        array = jnp.transpose(array, self.permutation)
        end = self.num_layers + self.num_positions
        shape = array.shape
        return array.reshape(
            math.prod(shape[: self.num_layers]),
            *shape[self.num_layers : end],
            math.prod(shape[end:]),
        )

    def laid_out(self, features: Array, shape: tuple[int, ...]) -> Array:
        """Return (layers, features) so that it broadcasts to the array, which has this shape."""
        end = self.num_layers + self.num_positions
        sizes = [shape[axis] for axis in self.permutation]
        sizes[self.num_layers : end] = [1] * self.num_positions
        order = sorted(range(len(shape)), key=lambda i: self.permutation[i])
        return jnp.transpose(features.reshape(sizes), order)

    @property
    def features(self) -> tuple[int, ...]:
        """Return the array's axes that become features, in their order."""
        return self.permutation[self.num_layers + self.num_positions :]


@dataclasses.dataclass(frozen=True)
class Patches:
    """The making of patches from a convolution's input, in `conv_general_dilated`'s own terms."""

    lhs_spec: tuple[int, ...]
    out_spec: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    scan_axes: tuple[str, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Return the output's axes that become positions, in their order."""
        n = len(self.scan_axes)
        space = (n + i for i in (self.out_spec[0], *self.out_spec[2:]))
        return (*space, *(i for i, kind in enumerate(self.scan_axes) if kind == "use"))

    @property
    def features(self) -> tuple[int, ...]:
        """Return the output's axis of features; groups, of which there are several, share it."""
        return (len(self.scan_axes) + self.out_spec[1],)

    def _merge(self, array: Array, spec: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
        n = len(self.scan_axes)
        array = jnp.transpose(array, (*range(n), *(n + i for i in spec)))
        return array.reshape(-1, *array.shape[n + 1 :]), array.shape[: n + 1]

    def _split(self, array: Array, lead: tuple[int, ...]) -> Array:
        """Bring (scans·batch, groups·features, space...) to the canonical form."""
        n, space = len(self.scan_axes), array.ndim - 2
        # `lead` is (scans..., batch); groups become layers, as each has a matrix of its own.
        array = array.reshape(*lead, self.groups, -1, *array.shape[2:])
        layers = [i for i, kind in enumerate(self.scan_axes) if kind == "layer"]
        uses = [i for i, kind in enumerate(self.scan_axes) if kind == "use"]
        positions = [n, *(n + 3 + i for i in range(space)), *uses]
        axes = Axes((*layers, n + 1, *positions, n + 2), len(layers) + 1, len(positions))
        return axes.canonical(array)

    def laid_out(self, features: Array, shape: tuple[int, ...]) -> Array:
        """Return (layers, d_out), groups among the layers, so that it broadcasts to the output."""
        n = len(self.scan_axes)
        sizes = [shape[i] if kind == "layer" else 1 for i, kind in enumerate(self.scan_axes)]
        sizes += [1] * (len(shape) - n)
        sizes[n + self.out_spec[1]] = shape[n + self.out_spec[1]]
        return features.reshape(sizes)

    def inputs(self, array: Array) -> Array:
        """Return patches (layers, batch, space..., d_in), channel-major as a kernel is."""
        # Scans are merged into the batch, as the patches of all iterations are cut alike.
        merged, lead = self._merge(array, self.lhs_spec)
        patches = jax.lax.conv_general_dilated_patches(
            merged,
            self.window,
            self.strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            precision=jax.lax.Precision.HIGHEST,
        )
        return self._split(patches, lead)

    def gradients(self, array: Array) -> Array:
        """Return the output gradient laid out as (layers, batch, space..., d_out)."""
        return self._split(*self._merge(array, self.out_spec))


def cut(array: Array, window: tuple[tuple[int, int], ...] | None) -> Array:
    """Return a window of an array, all of it for None."""
    if window is None:
        return array
    return jax.lax.slice(array, [start for start, _ in window], [stop for _, stop in window])


@dataclasses.dataclass(frozen=True)
class Site:
    """One equation in which an activation meets a parameter.

    Attributes:
        name: the parameter's path, with "#k" from its second site on.
        kind: "dense", "conv", "embedding", "scale" or "bias".
        weight: the place of its matrix in the parameters.
        record: which captured activation it reads; sites with the same `record` share one array.
        probe: which probe stands at its equation's output; sites of one equation share it.
        axes_in: canonical form of the activation (`Patches` for a convolution, None for a bias).
        axes_out: canonical form of the output gradient.
        scale: constant factor between the parameter and the operand.
        bias_scale: constant factor of the bias, the value of A's homogeneous coordinate.
        input_shape: the activation's shape, scans in front (empty for a bias).
        output_shape: the output's shape, scans in front.
        num_uses: how often the equation runs with the same weight in one call.
        branch: index of the indicator that its `cond` branch ran, or None.
        source: file and line of the equation.
        index_mode: for an embedding, what its gather does with indices out of range.
        index_column: for an embedding, which column of the indices chooses the row.
        window_in: by axis, which part of what is captured is this site's (several parameters joined
            to one operand), (start, stop); None for all of it.
        window_out: by axis, which part of its equation's output is this site's; None for all.
        num_scans: how many axes of scans stand in front of activation and output.
    """

    name: str
    kind: str
    weight: Weight
    record: int | None
    probe: int
    axes_in: Axes | Patches | None
    axes_out: Axes | Patches
    scale: float
    bias_scale: float
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    output_dtype: str
    num_uses: int
    branch: int | None
    source: str
    index_mode: str = ""
    index_column: int = 0
    window_in: tuple[tuple[int, int], ...] | None = None
    window_out: tuple[tuple[int, int], ...] | None = None
    num_scans: int = 0

    @property
    def path(self) -> str:
        """Return the parameter's path."""
        return self.weight.path

    def canonical_inputs(self, activation: Array) -> Array:
        """Return (layers, positions..., d_in), unscaled; for a gather its indices, without d_in."""
        if isinstance(self.axes_in, Patches):
            return self.axes_in.inputs(activation)
        if self.kind == "scale":
            unit = (1,) * (len(self.output_shape) - activation.ndim)  # a scalar times a vector
            activation = activation.reshape(*activation.shape, *unit)
            activation = jnp.broadcast_to(activation, self.output_shape)
        assert self.axes_in is not None, f"{self.name!r} is a bias: nothing enters it"
        canonical = self.axes_in.canonical(activation)
        return canonical[..., self.index_column] if self.kind == "embedding" else canonical

    def canonical_gradients(self, gradient: Array) -> Array:
        """Return the output gradient laid out as (layers, positions..., d_out)."""
        if isinstance(self.axes_out, Patches):
            return self.axes_out.gradients(gradient)
        return self.axes_out.canonical(gradient)

    def laid_out(self, features: Array) -> Array:
        """Return (layers, d_out) so that it broadcasts to the output, scans in front."""
        return self.axes_out.laid_out(features, self.output_shape)

    @property
    def shared_input(self) -> tuple:
        """Return a value equal for two sites exactly when their canonical inputs are one array."""
        column = self.index_column if self.kind == "embedding" else None
        return (self.record, self.axes_in, self.window_in, column)

    def row(self) -> tuple[str, ...]:
        """Return this site's line in the coverage table."""
        bias = f" + {self.weight.bias_path}" if self.weight.bias_path else ""
        stacked = f"{self.weight.layers} x " if self.weight.is_stacked else ""
        return (
            self.name + bias,
            self.kind,
            f"{stacked}{self.weight.d_in} -> {self.weight.d_out}",
            str(self.input_shape or "-"),
            str(self.output_shape),
            str(self.num_uses),
            self.source,
        )


class Sites(Mapping[str, Site]):
    """A mapping from a site's name to its `Site`; `str()` of it is the coverage table.

    Attributes:
        uncovered: each selected parameter path that has no site, and the reason.
        stopped: parameters that enter where no gradient flows, whether elsewhere too or not.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        uncovered: Mapping[str, str],
        stopped: Collection[str] = (),
    ):
        self._sites = {site.name: site for site in sites}
        self.uncovered = dict(uncovered)
        self.stopped = frozenset(stopped)

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def covered(self) -> tuple[str, ...]:
        """Return paths of the parameters that have sites, biases included."""
        return tuple(dict.fromkeys(p for site in self.values() for p in site.weight.paths))

    def __str__(self) -> str:
        lines = [text_table(self._rows())]
        if self.uncovered:
            lines += ["", "uncovered:", *(f"  {p}: {r}" for p, r in self.uncovered.items())]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        below = (f"uncovered: {path}: {reason}" for path, reason in self.uncovered.items())
        return html_table(self._rows(), below)

    def _rows(self) -> list[tuple[str, ...]]:
        header = ("parameter", "kind", "matrix", "input", "output", "uses", "where")
        return [header, *(site.row() for site in self.values())]
