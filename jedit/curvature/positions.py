"""How a site's positions correspond to the examples and outputs that a batch's masks speak of.

`mask` and `valid` have the outputs' leading shape, (examples,) or (examples, positions, ...). Where
these axes are in a site is read off the program by what depends on what (`tracing.dependence`),
never off lengths: a batch may have as many examples as positions, a model may put time first, or
merge both axes in either order. What further axes a site has (heads, the pixels of a convolution)
belongs to the same output.

Two things are decided here. Whose gradient is whose: an entry of a site's output that influences
several examples (a lookup of positions that all examples share, tokens that were sorted, a mean
over the batch) belongs to none, and the site's gradients must not be taken apart. And what is
padding: all leading axes of the outputs must be found among the site's positions.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array

from jedit.tracing import Site
from jedit.tracing.dependence import Belonging, dependence
from jedit.tracing.discover import Program
from jedit.tracing.relations import Place


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Where the outputs' leading axes are in one site.

    Attributes:
        shape: of the site's output, scans in front.
        axes: those of its axes that are positions, in the order of the canonical form.
        lead: the outputs' leading shape.
        example: where the examples' number stands, by which positions are told apart; None: they
            cannot be.
        labels: for every axis of `lead` where its index stands in the site's output.
        is_merged: whether some entry influences several examples' outputs.
        is_bias: whether the site has no input, so that padding cannot pollute it.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    lead: tuple[int, ...]
    example: Place | None
    labels: tuple[frozenset[Place], ...]
    is_merged: bool
    is_bias: bool

    @property
    def positions(self) -> tuple[int, ...]:
        """The lengths of the positions' axes in the canonical form."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def is_maskable(self) -> bool:
        """Whether padding in this site can be told from data, or does not matter.

        It does not matter to a site of kind "bias", which has no input: its gradient is the
        output's, and that is zero at a padded position already.
        """
        return self.is_bias or bool(self._choices(self.axes))

    @property
    def is_in_order(self) -> bool:
        """Whether the positions, flattened, are the examples in order, and in each its outputs'.

        Or what else an example has, where its outputs are one.
        """
        total, number = math.prod(self.positions), self.lead[0]
        if number > 1 and (self.example is None or self._stride(self.example) * number != total):
            return False
        if total == number or len(self.lead) == 1:
            return True
        choices = self._choices(self.axes) if total == math.prod(self.lead) else []
        strides = [math.prod(self.lead[i + 1 :]) for i in range(len(self.lead))]
        return any(
            all(p is None or self._stride(p) == n for p, n in zip(choice, strides, strict=True))
            for choice in choices
        )

    def leads_with_outputs(self, skipped: int = 0) -> bool:
        """Whether the site's output begins with the outputs' leading axes, as they are.

        Args:
            skipped: how many axes in front are those of scans.
        """
        lead = enumerate(zip(self.lead, self.labels, strict=True))
        return all(n == 1 or Place(skipped + i, 1, n) in places for i, (n, places) in lead)

    def _stride(self, place: Place) -> int:
        """How far apart its neighbours are among the positions, flattened."""
        return place.inner * math.prod(self.positions[self.axes.index(place.axis) + 1 :])

    def by_example(self, x: Array) -> Array:
        """(layers, positions..., rest...) as (layers, examples, positions, rest...).

        Where examples cannot be told apart, all is one example.
        """
        layers, rest = x.shape[0], x.shape[1 + len(self.axes) :]
        if self.example is None:
            return x.reshape(layers, 1, -1, *rest)
        axis, inner, number = self.example
        where, shape = self.axes.index(axis), self.positions
        split = (shape[where] // (inner * number), number, inner)
        if math.prod((*shape[:where], split[0])) > 1:
            x = x.reshape(layers, *shape[:where], *split, *shape[where + 1 :], *rest)
            x = jnp.moveaxis(x, 2 + where, 1)
        return x.reshape(layers, number, -1, *rest)

    def spread(self, valid: Array) -> Array | None:
        """`valid` of the site's positions, (1, examples, positions); None where it is unknown."""
        choices = self._choices(self.axes)
        if not choices:
            return None
        places = {axis: i for i, axis in enumerate(self.axes)}
        chosen = [
            [place and place._replace(axis=places[place.axis]) for place in choice]
            for choice in choices
        ]
        return self.by_example(_placed(valid, chosen, self.positions)[None])

    def at_output(self, valid: Array) -> Array | None:
        """`valid` of the site's output as it is, of its shape; None where it is unknown."""
        choices = self._choices(range(len(self.shape)))
        return _placed(valid, choices, self.shape) if choices else None

    def _choices(self, axes: Iterable[int]) -> list[tuple[Place | None, ...]]:
        """Every way to find all of `lead` among these axes; an axis of one entry is everywhere.

        An entry is data if it is by all of them: that of a query and a key, if both are.
        """
        axes = tuple(axes)
        found = [
            [None] if n == 1 else sorted(p for p in places if p.axis in axes)
            for n, places in zip(self.lead, self.labels, strict=True)
        ]
        choices = list(itertools.product(*found))
        return choices if all(_order(choice) is not None for choice in choices) else []


def align(program: Program, lead: tuple[int, ...]) -> dict[str, Alignment]:
    """The alignment of every site of a traced function.

    Args:
        program: the trace.
        lead: the outputs' leading shape, (examples, ...).

    Returns:
        By the site's name.

    Raises:
        ValueError: the examples of the inputs are not the outputs' leading axis.
    """
    found = dependence(program, lead)
    if lead[0] > 1 and found.outputs and Place(0, 1, lead[0]) not in found.outputs:
        axes = ", ".join(str(place.axis) for place in sorted(found.outputs))
        (shape,) = (v.aval.shape for v in program.jaxpr.jaxpr.outvars)
        raise ValueError(
            f"the inputs' {lead[0]} examples are axis {axes} of the outputs {shape}, not their "
            "leading axis; apply must return outputs (examples, ..., classes or features)"
        )
    return {name: _align(site, found.sites[name], lead) for name, site in program.sites.items()}


def _align(site: Site, belonging: Belonging, lead: tuple[int, ...]) -> Alignment:
    axes = site.axes_out.positions
    reach = belonging.reach
    if reach is None:  # no gradient comes here, so the labels' word is enough
        reach = min(belonging.labels[0], default=None)
    is_among = isinstance(reach, Place) and reach.axis in axes
    return Alignment(
        shape=site.output_shape,
        axes=axes,
        lead=lead,
        example=reach if isinstance(reach, Place) and is_among and lead[0] > 1 else None,
        labels=belonging.labels,
        is_merged=lead[0] > 1 and belonging.reach is not None and not is_among,
        is_bias=site.kind == "bias",
    )


def _order(choice: tuple[Place | None, ...]) -> list[int] | None:
    """The leading axes that stand somewhere, outermost first; None where two are entangled."""
    found = [(place, i) for i, place in enumerate(choice) if place is not None]
    found.sort(key=lambda one: (one[0].axis, -one[0].inner))
    for (one, _), (other, _) in itertools.pairwise(found):
        if one.axis == other.axis and one.inner % (other.inner * other.size):
            return None
    return [i for _, i in found]


def _placed(valid: Array, choices, shape: tuple[int, ...]) -> Array:
    """`valid` laid out like an array of that shape; where there are several choices, their and."""
    laid = [_placed_once(valid, tuple(choice), shape) for choice in choices]
    whole = laid[0]
    for other in laid[1:]:
        whole = whole & other
    return whole


def _placed_once(valid: Array, choice: tuple[Place | None, ...], shape: tuple[int, ...]) -> Array:
    order = _order(choice)
    assert order is not None
    valid = valid.reshape([n for n, place in zip(valid.shape, choice, strict=True) if place])
    standing = [i for i, place in enumerate(choice) if place is not None]
    valid = jnp.transpose(valid, [standing.index(i) for i in order])
    full, thin = (
        [],
        [],
    )  # every axis in its factors: their sizes, and those that `valid` varies along
    for axis, length in enumerate(shape):
        left = length
        for place in (choice[i] for i in order):
            if place is None or place.axis != axis:
                continue
            full += [left // (place.size * place.inner), place.size]
            thin += [1, place.size]
            left = place.inner
        full.append(left)
        thin.append(1)
    return jnp.broadcast_to(valid.reshape(thin), full).reshape(shape)
