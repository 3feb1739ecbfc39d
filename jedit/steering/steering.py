"""A steering is a value: affine maps of the outputs of some sites, and nothing about the model.

    h <- h + s γ(h) ((a - 1) h + b)          for every unit of every site that it names

    h    the output of a site, its bias in it; in front of it stand layers (of a scan, of experts)
    a    gain     b    shift     γ    gate, 1 where there is none      s    strength

It is applied in two ways. `steered` intervenes on the traced program, so that the parameters stay
what they are, whatever the model is written in. `fold` writes it into the weights as an `Edit`,
where the map is linear in what the parameters say: W diag(a), and a b₀ + b for the bias. Both make
the same function. Names of sites are those of `find_sites`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jedit.core.arguments import check_kind
from jedit.core.checks import FINITE, check_numbers
from jedit.core.display import MAX_ROWS, html_table, is_concrete, short, short_repr, text_table
from jedit.core.precision import wide_dtype
from jedit.tracing import Rewritten, Site, rewrite_outputs

Scalar = float | int | Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gate:
    """A strength that depends on the output itself: γ(h) = σ(sharpness (⟨h, direction⟩ - least)).

    Attributes:
        direction: (layers, units), or (units,) for all layers: along what the output is measured.
        least: (layers,) or one number, of ⟨h, direction⟩: the gate is half open there.
        sharpness: (layers,) or one number: how fast it opens, per unit of ⟨h, direction⟩.
    """

    direction: Float[Array, "..."]
    least: Float[Array, "..."]
    sharpness: Float[Array, "..."]

    __repr__ = short_repr


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """The map of one site's output; what is None is left out.

    Attributes:
        gain: a, (layers, units), or (units,) for all layers; several axes may stand for either, as
            scanned layers and their experts do. None: 1, and known to be.
        shift: b, likewise. None: 0.
        gate: a strength that depends on the output; such a map does not fold into weights.
    """

    gain: Float[Array, "..."] | None = None
    shift: Float[Array, "..."] | None = None
    gate: Gate | None = None

    __repr__ = short_repr

    def only(self, units: Bool[Array, "..."]) -> "Affine":
        """Return the map that moves these units alone, (layers, units) or (units,)."""
        units = jnp.asarray(units)
        gain = None if self.gain is None else jnp.where(units, self.gain, 1)
        shift = None if self.shift is None else jnp.where(units, self.shift, 0)
        return replace(self, gain=gain, shift=shift)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steering:
    """Maps of some sites' outputs; a pytree, so it jits, vmaps and is differentiated.

        steering = Steering({"blocks/0/mlp/up/kernel": Affine(gain=gain, shift=shift)})
        outputs = steered(apply, steering, strength=0.5)(params, inputs)
        edited = apply_edit(params, fold(apply, params, inputs, steering), 0.5)

    Attributes:
        maps: by site, as `find_sites` names it, the map of its output.
    """

    maps: Mapping[str, Affine]

    def __repr__(self) -> str:
        return f"{self._heading()}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), [self._heading()])

    def _heading(self) -> str:
        return f"Steering of {len(self.maps)} site{'' if len(self.maps) == 1 else 's'}"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("site", "units", "moved", "gain", "shift", "gate")]
        for name, one in list(self.maps.items())[:MAX_ROWS]:
            if not isinstance(one, Affine):  # JAX puts other things in the place of maps
                rows.append((name, "-", "-", short(one), "", ""))
                continue
            parts = [part for part in (one.gain, one.shift) if part is not None]
            shape = " x ".join(map(str, parts[0].shape)) if parts else "-"
            shown = ("yes" if part is not None else "" for part in (one.gain, one.shift, one.gate))
            rows.append((name, shape, _num_moved(one), *shown))
        if (rest := len(self.maps) - MAX_ROWS) > 0:
            rows.append((f"and {rest} more", *[""] * 5))
        return rows


def steered(apply: Callable, steering: Steering, strength: Scalar = 1.0) -> Callable:
    """Return the steered function `(params, inputs) -> outputs`; the parameters stay as they are.

    It traces `apply` again at every call, so jit what it is called in. It may be differentiated,
    in the steering and the strength too. Traced itself, it has the sites that `apply` has.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        steering: the maps.
        strength: s, of all maps: 0 changes nothing, the default, 1.0, is the whole map, and more
            goes beyond it.

    Raises:
        TypeError: an argument is something else.
        ValueError: the strength is not finite. When called: a map's site is none of the function,
            or has other units.
    """
    check_numbers(FINITE, strength=strength)
    check_kind(steering, Steering, "steering", "as `mean_difference` makes it")

    def run(params: PyTree, inputs: PyTree) -> Array:
        return run_steered(apply, params, inputs, steering, strength=strength).outputs

    return run


def run_steered(
    apply: Callable,
    params: PyTree,
    inputs: PyTree,
    steering: Steering,
    *,
    strength: Scalar = 1.0,
) -> Rewritten:
    """Run the steered function once, and keep the moved outputs beside what it returned.

    `Rewritten.site_outputs` are the moved h without their bias; `whole_outputs` adds it.

    Args:
        apply: a pure function `apply(params, inputs) -> outputs`, one array.
        params: pytree of floating-point arrays.
        inputs: pytree of arrays that lead with the examples.
        steering: the maps.
        strength: strength of all maps, 1.0 for the whole.

    Raises:
        ValueError: a map's site is none of the function, or has other units; or the strength is
            not finite.
    """
    check_numbers(FINITE, strength=strength)
    changes = {name: _making(name, one, strength) for name, one in steering.maps.items()}
    return rewrite_outputs(apply, params, inputs, changes)


def whole_outputs(run: Rewritten, params: Mapping[str, Array]) -> dict[str, Array]:
    """Return h for each site of a run: (layers, positions..., units), the bias added.

    Args:
        run: what `run_steered` returned.
        params: the parameters by path.
    """
    found = {}
    for name, site in run.sites.items():
        h = site.canonical_gradients(run.site_outputs[name])  # which relays any array of its shape
        bias = bias_of(site, params)
        found[name] = h if bias is None else h + _expand(bias, h).astype(h.dtype)
    return found


def units_of(name: str, site: Site, vector: Array, what: str) -> Float[Array, "layers units"]:
    """Return a map's array as (layers, units).

    Raises:
        ValueError: it has another shape.
    """
    vector, weight = jnp.asarray(vector), site.weight
    wanted = (weight.layers, weight.d_out)
    if vector.shape == (weight.d_out,):
        return jnp.broadcast_to(vector[None], wanted)
    # Axes of layers and of experts, or of heads and their units, may stand one by one.
    splits = [(vector.shape[:k], vector.shape[k:]) for k in range(vector.ndim + 1)]
    if wanted not in [tuple(map(math.prod, parts)) for parts in splits]:
        raise ValueError(
            f"{name}: the {what} has shape {vector.shape}, the site's outputs are (layers, units) "
            f"= {wanted}"
        )
    return vector.reshape(wanted)


def bias_of(site: Site, params: Mapping[str, Array]) -> Float[Array, "layers units"] | None:
    """Return what a site's bias adds to its output; None where it has none."""
    weight = site.weight
    if weight.bias_path is None:
        return None
    return site.bias_scale * weight.bias_row.gather(params)[:, 0]


def _making(name: str, one: Affine, strength: Scalar) -> Callable:
    def make(site: Site, params: Mapping[str, Array]) -> tuple[Callable, PyTree]:
        def laid(vector: Array | None, what: str) -> Array | None:
            return None if vector is None else site.laid_out(units_of(name, site, vector, what))

        given = {
            "gain": laid(one.gain, "gain"),
            "shift": laid(one.shift, "shift"),
            "bias": laid(bias_of(site, params), "bias"),
            "strength": site.laid_out(jnp.full((site.weight.layers, site.weight.d_out), strength)),
        }
        gate = one.gate
        if gate is None:
            return _moved, given
        features = _local_features(name, site)
        for part in ("least", "sharpness"):
            numbers = jnp.asarray(getattr(gate, part)).reshape(-1, 1)
            wanted = (site.weight.layers, site.weight.d_out)
            given[part] = site.laid_out(jnp.broadcast_to(numbers, wanted))
        given["direction"] = laid(gate.direction, "gate's direction")
        return lambda y, given: _moved(y, given, features), given

    return make


def _moved(y: Array, given: Mapping[str, Any], features: tuple[int, ...] = ()) -> Array:
    """Return a site's output before its bias, moved by the map of the output with its bias."""
    dtype = wide_dtype(y.dtype)
    given = {name: x if x is None else x.astype(dtype) for name, x in given.items()}
    wide = y.astype(dtype)
    h = wide if given["bias"] is None else wide + given["bias"]
    change = jnp.zeros_like(h)
    if given["gain"] is not None:
        change = change + (given["gain"] - 1) * h
    if given["shift"] is not None:
        change = change + given["shift"]
    strength = given["strength"]
    if "direction" in given:
        along = jnp.sum(h * given["direction"], axis=features, keepdims=True)
        strength = strength * jax.nn.sigmoid(given["sharpness"] * (along - given["least"]))
    return wide + strength * change


def _local_features(name: str, site: Site) -> tuple[int, ...]:
    """Return the axes of units in one iteration's output.

    Raises:
        ValueError: groups of a convolution share the axis.
    """
    if site.kind == "conv" and site.axes_out.groups > 1:  # type: ignore[union-attr]
        raise ValueError(f"{name} is a convolution of groups, whose outputs no gate can be of")
    return tuple(axis - site.num_scans for axis in site.axes_out.features)


def _expand(vector: Float[Array, "layers units"], like: Array) -> Array:
    return vector.reshape(vector.shape[0], *(1,) * (like.ndim - 2), vector.shape[1])


def _num_moved(one: Affine) -> str:
    """Say how many units a map moves, if its numbers are there to be looked at."""
    parts = [part for part in (one.gain, one.shift) if part is not None]
    if not parts or not all(map(is_concrete, parts)):
        return "-"
    with jax.ensure_compile_time_eval():  # what is printed under jit is no part of the program
        moved = jnp.zeros(parts[0].shape, bool)
        for part, still in ((one.gain, 1), (one.shift, 0)):
            moved = moved if part is None else moved | (jnp.asarray(part) != still)
        return str(int(jnp.sum(moved)))
