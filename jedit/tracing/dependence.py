"""Which example, and which output, every entry of a traced function belongs to.

Two questions are asked of each site's output, and answered from the program alone, axis by axis
(`relations`), whatever the axes' lengths are:

    reach    which examples' outputs an entry influences: those of one example, whose number is the
             entry's index along some axis (then the gradient there is that example's), or several.
             Followed from the outputs back. A claim: what is not proved counts as "several".
    labels   along which axes the index is an example's number, or a position's, as the outputs'
             axes count them. Followed from the outputs and the inputs in both directions, so that
             attention's keys are positions as its queries are. It tells what a mask speaks of.

In a scan, all arrays of the body have the loop's axis in front.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex_core

from jedit.tracing import versions
from jedit.tracing.discover import Program
from jedit.tracing.interpreter import Plan
from jedit.tracing.relations import Place, Relations, relate
from jedit.tracing.versions import inner_jaxprs, scan_layout

SEVERAL = "several"
RELAYOUTS = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", *versions.CAST)
Reach = Place | str | None  # None: no output is influenced
Window = tuple[tuple[int, int], ...]
Label = tuple[int, Place]  # the outputs' axis, and where its index stands


class Belonging(NamedTuple):
    """The examples and positions to which the entries of one site's output belong.

    Attributes:
        reach: where the number of the one example stands that an entry influences, SEVERAL, or None
            if it influences nothing.
        labels: for every leading axis of the outputs, where its index stands.
    """

    reach: Reach
    labels: tuple[frozenset[Place], ...]


class Dependence(NamedTuple):
    """The examples and positions to which the entries of a program's arrays belong.

    Attributes:
        sites: by site, to whom the entries of its output belong.
        outputs: where the number of an input's example stands in the outputs; empty if that is not
            known.
    """

    sites: dict[str, Belonging]
    outputs: frozenset[Place]


def dependence(program: Program, lead: Sequence[int]) -> Dependence:
    """Follow examples and positions through a traced `apply(params, inputs)`.

    Args:
        program: the trace; the inputs lead with the examples.
        lead: the leading axes of the output: examples, and positions.

    Returns:
        Where examples and positions stand in every site's output, and in the outputs.
    """
    reached, labelled, outputs = at_probes(program.jaxpr, program.plan, program.num_params, lead)
    shapes = {tap.probe: tap.shape for tap in program.plan.all_taps()}
    sites = {
        name: _within(
            Belonging(
                reached.get(site.probe),
                tuple(
                    frozenset(p for k, p in labelled[site.probe] if k == i)
                    for i in range(len(lead))
                ),
            ),
            site.window_out,
            shapes[site.probe],
        )
        for name, site in program.sites.items()
    }
    return Dependence(sites, outputs)


def at_probes(
    jaxpr: jex_core.ClosedJaxpr, plan: Plan, num_params: int, lead: Sequence[int]
) -> tuple[dict[int, Reach], dict[int, Iterable[Label]], frozenset[Place]]:
    """Return, by probe, what the tapped outputs reach and their labels; and of all outputs."""
    frame = _Frame(jaxpr.jaxpr, jaxpr.consts, plan, 0, keeps_integers=False)
    output = jaxpr.jaxpr.outvars[0]
    for v in jaxpr.jaxpr.invars[num_params:]:
        if v.aval.shape:
            frame.add(v, [(0, Place(0, 1, v.aval.shape[0]))])
    # The order matters: before the outputs' own labels are put on, what reaches them is the inputs'
    # examples alone.
    frame.settle()
    outputs = frozenset(place for _, place in frame.of(output))
    frame.pull([Place(0, 1, lead[0])])
    frame.add(output, [(i, Place(i, 1, n)) for i, n in enumerate(lead)])
    frame.settle()
    return *frame.at_probes(), outputs


def _within(belonging: Belonging, window: Window | None, shape: Sequence[int]) -> Belonging:
    """Drop what is said of axes that a site's window cuts: along them no place keeps its index."""
    if window is None:
        return belonging
    is_cut = {i for i, part in enumerate(window) if part != (0, shape[i])}
    reach, labels = belonging
    if isinstance(reach, Place) and reach.axis in is_cut:
        reach = SEVERAL
    whole = (frozenset(p for p in places if p.axis not in is_cut) for places in labels)
    return Belonging(reach, tuple(whole))


class _Frame:
    """What is known of the variables in one call of one jaxpr, `depth` scans deep.

    Inner calls have frames of their own.
    """

    def __init__(self, jaxpr, consts, plan: Plan, depth: int, *, keeps_integers: bool) -> None:
        self.jaxpr, self.plan, self.depth = jaxpr, plan, depth
        self.keeps_integers = keeps_integers
        self.labels: dict = {}
        self.settled: dict[int, list[int]] = {}
        self.reached: dict[int, Reach] = {}
        self.has_grown = False
        self.relations: list[Relations] = []
        self.inner: dict[int, list[_Frame]] = {}
        counting = _Counting(jaxpr, consts)
        for i, eqn in enumerate(jaxpr.eqns):
            self.inner[i] = self._entered(i, eqn)
            self.relations.append({} if self.inner[i] else relate(eqn, counting.columns(eqn)))
            counting.see(eqn)

    def _entered(self, i: int, eqn) -> list["_Frame"]:
        """Return frames of what an equation calls, if it is known how it calls it."""
        name, jaxprs = eqn.primitive.name, inner_jaxprs(eqn)
        is_rule = name in versions.CUSTOM_RULE
        if name == "cond":
            jaxprs = list(eqn.params["branches"])
        elif name == "scan" or name in versions.INLINED or is_rule:
            jaxprs = jaxprs[:1]
        else:
            return []
        # A cond's first operand chooses the branch. A call whose operands are not one by one those
        # of its jaxpr (a custom rule that takes more) is not followed into, which is safe.
        num_inputs = len(eqn.invars) - (name == "cond")
        if any(
            (len(j.jaxpr.invars), len(j.jaxpr.outvars)) != (num_inputs, len(eqn.outvars))
            for j in jaxprs
        ):
            return []
        plans = self.plan.inner.get(i, (Plan(),) * len(jaxprs))
        return [
            # A custom rule may let gradients pass where its function has integers.
            _Frame(
                j.jaxpr,
                j.consts,
                plan,
                self.depth + (name == "scan"),
                keeps_integers=self.keeps_integers or is_rule,
            )
            for j, plan in zip(jaxprs, plans, strict=True)
        ]

    def at_probes(self) -> tuple[dict[int, Reach], dict[int, Iterable[Label]]]:
        """Return, by probe, what is reached and the labels, of this frame and of all within."""
        reached = dict(self.reached)
        labelled: dict[int, Iterable[Label]] = {
            tap.probe: self.of(self.jaxpr.eqns[i].outvars[0])
            for i, taps in self.plan.taps.items()
            for tap in taps
        }
        for frame in (frame for frames in self.inner.values() for frame in frames):
            within = frame.at_probes()
            reached |= within[0]
            labelled |= within[1]
        return reached, labelled

    # What is reached, from the outputs back.

    def pull(self, outs: Sequence[Reach]) -> list[Reach]:
        """Return what each input reaches, given what each output reaches."""
        found: dict = {}
        for atom, reach in zip(self.jaxpr.outvars, outs, strict=True):
            self._meet(found, atom, reach)
        for i in reversed(range(len(self.jaxpr.eqns))):
            eqn = self.jaxpr.eqns[i]
            given = [found.get(v) for v in eqn.outvars]
            for tap in self.plan.taps.get(i, ()):
                self.reached[tap.probe] = given[0]
            if any(reach is not None for reach in given):
                for atom, reach in zip(eqn.invars, self._operands(i, eqn, given), strict=True):
                    self._meet(found, atom, reach)
        return [found.get(v) for v in self.jaxpr.invars]

    def _meet(self, found: dict, atom, reach: Reach) -> None:
        if reach is None or isinstance(atom, jex_core.Literal):
            return
        # No gradient flows through integers, so that what they influence is of no account.
        if self.keeps_integers or jnp.issubdtype(atom.aval.dtype, jnp.inexact):
            found[atom] = _joined(found.get(atom), reach)

    def _operands(self, i: int, eqn, given: list[Reach]) -> list[Reach]:
        name = eqn.primitive.name
        if name == "scan" and self.inner[i]:
            return self._pull_scan(eqn, self.inner[i][0], given)
        if name == "cond" and self.inner[i]:
            branches = [frame.pull(given) for frame in self.inner[i]]
            joined = [_joined(*reaches) for reaches in zip(*branches, strict=True)]
            return [SEVERAL, *joined]  # one index chooses the branch for all examples
        if self.inner[i]:
            return self.inner[i][0].pull(given)
        if name in versions.NO_GRADIENT and not self.keeps_integers:
            return [None] * len(eqn.invars)
        return [
            _joined(*(self._operand(i, k, j, reach) for j, reach in enumerate(given)))
            for k in range(len(eqn.invars))
        ]

    def _operand(self, i: int, k: int, j: int, reach: Reach) -> Reach:
        if not isinstance(reach, Place) or reach.axis < self.depth:
            return reach  # all of an iteration's arrays belong to that iteration
        relation = self.relations[i].get((k, j))
        local = relation and relation.to_operand(_moved(reach, -self.depth))
        return SEVERAL if local is None else _moved(local, self.depth)

    def _pull_scan(self, eqn, body: "_Frame", given: list[Reach]) -> list[Reach]:
        num_consts, num_carry = scan_layout(eqn)
        end = num_consts + num_carry
        # A carry reaches what every later iteration's carry reaches: iterate to a fixed point,
        # which exists, as a reach can only go from nothing to one example to several.
        carry = [self._inward(reach) for reach in given[:num_carry]]
        while True:
            ins = body.pull([*carry, *given[num_carry:]])
            looped = [self._outward(reach) for reach in ins[num_consts:end]]
            grown = [_joined(a, self._inward(b)) for a, b in zip(carry, looped, strict=True)]
            if grown == carry:
                return [*map(self._outward, ins[:num_consts]), *looped, *ins[end:]]
            carry = grown

    def _inward(self, reach: Reach) -> Reach:
        """Return how a loop's body sees the reach of an array that has no axis for the loop."""
        if not isinstance(reach, Place) or reach.axis < self.depth:
            return reach
        return _moved(reach, 1)

    def _outward(self, reach: Reach) -> Reach:
        """Return how the code around a loop sees a reach in its body that has no axis for the loop.

        What belongs to the example of one iteration's number reaches several outside.
        """
        if not isinstance(reach, Place) or reach.axis < self.depth:
            return reach
        return SEVERAL if reach.axis == self.depth else _moved(reach, -1)

    # Labels, in both directions.

    def of(self, atom) -> frozenset[Label]:
        """Return the labels of a variable."""
        if isinstance(atom, jex_core.Literal):
            return frozenset()
        return self.labels.get(atom, frozenset())

    def add(self, atom, labels: Iterable[Label]) -> None:
        """Put labels on a variable."""
        if isinstance(atom, jex_core.Literal):
            return
        before = self.of(atom)
        after = before.union(labels)
        if len(after) > len(before):
            self.labels[atom] = after
            self.has_grown = True

    def settle(self) -> bool:
        """Spread all labels until nothing changes, and return whether something has."""
        has_changed = False
        while True:
            self.has_grown = False
            # Forth and back in one sweep: a chain of equations settles in two sweeps, not in as
            # many as it is long.
            order = range(len(self.jaxpr.eqns))
            for i in (*order, *reversed(order)):
                self._spread(i, self.jaxpr.eqns[i])
            if not self.has_grown:
                return has_changed
            has_changed = True

    def _spread(self, i: int, eqn) -> None:
        # Labels only grow, so that equal counts mean equal sets: nothing new to spread.
        known = [len(self.of(v)) for v in (*eqn.invars, *eqn.outvars)]
        if self.settled.get(i) == known or not any(known):
            return
        self.settled[i] = known
        if self.inner[i]:
            self._spread_inside(eqn, self.inner[i])
        for (k, j), relation in self.relations[i].items():
            a, b = eqn.invars[k], eqn.outvars[j]
            for one, other, move in (
                (a, b, relation.to_output),
                (b, a, relation.to_operand),
            ):
                for axis, place in self.of(one):
                    local = place
                    if place.axis >= self.depth:
                        local = move(_moved(place, -self.depth), with_near=True)
                        local = local and _moved(local, self.depth)
                    if local is not None:
                        self.add(other, [(axis, local)])

    def _spread_inside(self, eqn, frames: list["_Frame"]) -> None:
        """Exchange labels with what an equation calls."""
        name = eqn.primitive.name
        num_consts, num_carry = scan_layout(eqn) if name == "scan" else (0, 0)
        invars = eqn.invars[1:] if name == "cond" else eqn.invars
        for frame in frames:
            ins, outs = frame.jaxpr.invars, frame.jaxpr.outvars
            pairs = []
            for k, (mine, its) in enumerate(zip(invars, ins, strict=True)):
                pairs.append((mine, its, name == "scan" and k < num_consts + num_carry))
            for j, (mine, its) in enumerate(zip(eqn.outvars, outs, strict=True)):
                pairs.append((mine, its, j < num_carry))
            for mine, its, has_no_loop in pairs:
                labels = self.of(mine)
                frame.add(its, self._reindexed(labels, self._inward) if has_no_loop else labels)
            carried = list(zip(ins[num_consts:], outs[:num_carry], strict=False))[:num_carry]
            # `|`, not `or`: both must run in every round.
            while frame.settle() | _exchanged(frame, carried, self.depth):
                pass
            for mine, its, has_no_loop in pairs:
                labels = frame.of(its)
                self.add(mine, self._reindexed(labels, self._outward) if has_no_loop else labels)

    @staticmethod
    def _reindexed(labels: Iterable[Label], move) -> list[Label]:
        moved = [(axis, move(place)) for axis, place in labels]
        return [(axis, place) for axis, place in moved if isinstance(place, Place)]


def _exchanged(frame: _Frame, carried, depth: int) -> bool:
    """Exchange labels between a loop's state as it enters and as it leaves an iteration.

    A label along the loop's own axis is no exchange: it names another iteration on the other side.

    Returns:
        Whether there was something new to exchange.
    """
    has_grown = False
    for a, b in carried:
        for one, other in ((a, b), (b, a)):
            before = len(frame.of(other))
            frame.add(other, [x for x in frame.of(one) if x[1].axis != depth])
            has_grown |= len(frame.of(other)) > before
    return has_grown


def _moved(place: Place, by: int) -> Place:
    return place._replace(axis=place.axis + by)


def _joined(*reaches: Reach) -> Reach:
    """Return what is reached by way of several uses: one example only if all agree on it."""
    different = {reach for reach in reaches if reach is not None}
    if len(different) > 1:
        return SEVERAL
    return next(iter(different), None)


class _Counting:
    """A record of which arrays count along an axis: an `arange`, and what indexing makes of it."""

    def __init__(self, jaxpr, consts) -> None:
        self.along: dict = {}  # variables that count, and along which axis
        self.joined: dict = {}  # variables with columns that count, and along which axis
        # JAX indexes by `select(i < 0, i + n, i)`, which for a count i is i: none is below zero.
        self.never: set = set()  # variables that are false throughout
        for variable, const in zip(jaxpr.constvars, consts, strict=True):
            if variable.aval.ndim == 1 and _is_count(const):
                self.along[variable] = 0

    def columns(self, eqn) -> dict[int, int]:
        """Return, of a gather's indices, the columns that count, and along which axis each does."""
        if eqn.primitive.name != "gather":
            return {}
        return self._columns(eqn.invars[1])

    def _columns(self, atom) -> dict[int, int]:
        if isinstance(atom, jex_core.Literal):
            return {}
        if atom in self.along and atom.aval.shape[-1] == 1:
            return {0: self.along[atom]}
        return self.joined.get(atom, {})

    def see(self, eqn) -> None:
        """Take note of what an equation makes."""
        if not eqn.outvars:
            return
        name, out = eqn.primitive.name, eqn.outvars[0]
        ins = [None if isinstance(v, jex_core.Literal) else v for v in eqn.invars]
        if name == "iota":
            self.along[out] = int(eqn.params["dimension"])
        elif name == "concatenate" and eqn.params["dimension"] == len(out.aval.shape) - 1:
            found, start = {}, 0
            for atom in eqn.invars:
                found |= {start + c: axis for c, axis in self._columns(atom).items()}
                start += atom.aval.shape[-1]
            self.joined[out] = found
        elif name == "lt" and ins[0] in self.along and ins[1] is None:
            if np.ndim(eqn.invars[1].val) == 0 and eqn.invars[1].val <= 0:
                self.never.add(out)
        elif name == "select_n" and ins[0] in self.never and ins[1] in self.along:
            self.along[out] = self.along[ins[1]]
        elif name in RELAYOUTS and ins[0] in self.along:
            axis = self.along[ins[0]]
            length = eqn.invars[0].aval.shape[axis]
            place = relate(eqn, {})[0, 0].to_output(Place(axis, 1, length))
            if place is not None and (place.inner, out.aval.shape[place.axis]) == (1, length):
                self.along[out] = place.axis


def _is_count(const) -> bool:
    """Say whether a constant is 0, 1, 2, ..."""
    if isinstance(const, Tracer) or not jnp.issubdtype(const.dtype, jnp.integer):
        return False
    return np.array_equal(np.asarray(const), np.arange(len(const)))
