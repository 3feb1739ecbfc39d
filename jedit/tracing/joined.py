"""Parameters put together into one array, by `concatenate` or `stack`: boxes, each of one leaf.

The functions of `Joined` are those of `Provenance`, so that a walk need not ask which it holds.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from jedit.tracing.provenance import Provenance, axis_groups

Box = tuple[tuple[int, int], ...]  # by axis, from where to where


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter leaf that fills a box of an array.

    Attributes:
        origin: the leaf, of the box's shape.
        box: where it begins and ends along each axis of the array.
        layers: (depth, start, stop) for each scan of whose iterations only those see the leaf.
    """

    origin: Provenance
    box: Box
    layers: tuple[tuple[int, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Joined:
    """An array of which some boxes are parameters, and the rest depends on no input."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the leaves in it."""
        return tuple(piece.origin.path for piece in self.pieces)

    @property
    def is_broadcast(self) -> bool:
        """Say whether some piece was expanded."""
        return any(piece.origin.is_broadcast for piece in self.pieces)

    def scaled(self, factor: float) -> "Joined":
        """Return the value times a constant."""
        return Joined(
            tuple(
                dataclasses.replace(piece, origin=piece.origin.scaled(factor))
                for piece in self.pieces
            ),
            self.shape,
        )

    def transposed(self, permutation: tuple[int, ...]) -> "Joined | None":
        """Return the value after `transpose`; None where it cannot be followed."""
        return self._each(
            tuple(self.shape[i] for i in permutation),
            lambda box: tuple(box[i] for i in permutation),
            lambda origin, _: origin.transposed(permutation),
        )

    def broadcast(self, shape: tuple[int, ...], dims: tuple[int, ...]) -> "Joined | None":
        """Return the value after `broadcast_in_dim`; None where it cannot be followed."""

        def moved(box: Box) -> Box:
            new = [(0, n) for n in shape]
            for axis, old, n in zip(dims, box, self.shape, strict=True):
                if n == shape[axis]:
                    new[axis] = old
            return tuple(new)

        return self._each(shape, moved, lambda origin, sizes: origin.broadcast(sizes, dims))

    def reshaped(self, shape: tuple[int, ...]) -> "Joined | None":
        """Return the value after `reshape`; None where a box would no longer be one."""
        if 0 in shape:
            return None
        groups = axis_groups(self.shape, shape)

        def moved(box: Box) -> Box | None:
            new = [(0, n) for n in shape]
            for before, after in groups:
                span = _span([box[i] for i in before], [self.shape[i] for i in before])
                part = span and _box_of(*span, [shape[j] for j in after])
                if part is None:
                    return None
                for j, range_ in zip(after, part, strict=True):
                    new[j] = range_
            return tuple(new)

        return self._each(shape, moved, lambda origin, sizes: origin.reshaped(sizes))

    def sliced(self, start, limit, strides) -> "Joined | Provenance | None":
        """Return the value after `slice`; None where entries are skipped."""
        if strides is not None and any(stride != 1 for stride in strides):
            return None
        pieces = []
        for piece in self.pieces:
            common = [
                (max(a, low), min(b, high))
                for (a, b), low, high in zip(piece.box, start, limit, strict=True)
            ]
            if any(a >= b for a, b in common):
                continue
            inside = [
                (a - low, b - low) for (a, b), (low, _) in zip(common, piece.box, strict=True)
            ]
            origin = piece.origin
            if tuple(b - a for a, b in inside) != origin.shape:
                cut = origin.sliced(tuple(a for a, _ in inside), tuple(b for _, b in inside), None)
                if cut is None:
                    return None
                origin = cut
            box = tuple((a - low, b - low) for (a, b), low in zip(common, start, strict=True))
            pieces.append(Piece(origin, box, piece.layers))
        shape = tuple(b - a for a, b in zip(start, limit, strict=True))
        return _simplest(pieces, shape)

    def scanned(self, depth: int) -> "Joined":
        """Return the slices of a value that a scan takes apart along its leading axis."""
        pieces = []
        for piece in self.pieces:
            (start, stop), *box = piece.box
            # A leaf that is only some layers of the array is seen by only those iterations.
            is_whole = stop - start == self.shape[0]
            layers = piece.layers if is_whole else (*piece.layers, (depth, start, stop))
            pieces.append(Piece(piece.origin.scanned(depth), tuple(box), layers))
        return Joined(tuple(pieces), self.shape[1:])

    def _each(self, shape: tuple[int, ...], move: Callable, relaid: Callable) -> "Joined | None":
        pieces = []
        for piece in self.pieces:
            box = move(piece.box)
            if box is None:
                return None
            origin = relaid(piece.origin, tuple(b - a for a, b in box))
            if origin is None:
                return None
            pieces.append(Piece(origin, box, piece.layers))
        return Joined(tuple(pieces), shape)


def pieces_of(origin: Provenance | Joined) -> tuple[Piece, ...]:
    """Return the pieces; a leaf by itself is one that fills all."""
    if isinstance(origin, Joined):
        return origin.pieces
    return (Piece(origin, tuple((0, n) for n in origin.shape)),)


def joined(origins: Sequence[Provenance | Joined | None], shapes, axis: int) -> Joined:
    """Return what `concatenate` makes of operands of these shapes; origin None: no parameter."""
    pieces, offset = [], 0
    for origin, shape in zip(origins, shapes, strict=True):
        for piece in () if origin is None else pieces_of(origin):
            box = tuple(
                (a + offset, b + offset) if i == axis else (a, b)
                for i, (a, b) in enumerate(piece.box)
            )
            pieces.append(Piece(piece.origin, box, piece.layers))
        offset += shape[axis]
    whole = tuple(offset if i == axis else n for i, n in enumerate(shapes[0]))
    return Joined(tuple(pieces), whole)


def _simplest(pieces: list[Piece], shape: tuple[int, ...]) -> Joined | Provenance:
    """Return the pieces as one value: a piece that fills everything stands for itself."""
    if len(pieces) == 1 and pieces[0].origin.shape == shape and not pieces[0].layers:
        return pieces[0].origin
    return Joined(tuple(pieces), shape)


def _span(box: Sequence[tuple[int, int]], sizes: Sequence[int]) -> tuple[int, int] | None:
    """Return where a box begins and ends in the flattened axes; None unless it is without gaps."""
    start, length = 0, 1
    for (a, b), n in zip(box, sizes, strict=True):
        # Behind an axis of which the box has several entries, every axis must be whole.
        if length > 1 and b - a != n:
            return None
        start, length = start * n + a, length * (b - a)
    return start, start + length


def _box_of(start: int, stop: int, sizes: Sequence[int]) -> Box | None:
    """Return the box that begins and ends there, `_span`'s inverse; None where it is no box."""
    box = []
    for i in range(len(sizes)):
        rest = math.prod(sizes[i + 1 :])
        first, last = start // rest, -(-stop // rest)  # rounded down, and up
        if last - first > 1 and (start % rest or stop % rest):
            return None
        if last - first > 1:
            whole = [(0, m) for m in sizes[i + 1 :]]
            return (*box, (first, last), *whole)
        box.append((first, last))
        start, stop = start - first * rest, stop - first * rest
    return tuple(box)
