"""What an edit of a model folder will need: bytes on each device, seconds, phase by phase.

    W    parameters as they are loaded             M    masters, beside those that are edited
    T    what is edited, in float32                S    sums of K-FAC, of the largest group
    C    factors, their eigenbases, eigenvalues    B    outputs of the model before, if kept
    I    inverses of factors without eigenvectors

What a phase holds is counted from shapes, and what its program takes beside that comes from the
compiler (`jedit.recipes.plan.programs`):

    fit          W + M + B + C of the groups before + S + a pass
    decompose    the same, the sums twice, the eigenvectors, and four matrices of the largest size
                 of which all are found
    natural      W + M + B + 5 C + 4 T + a step: the method's curvature, the optimizer's two copies,
                 one of them as its inverse, and those of the loop that overwrites its own
    look         W + M + B + 3 C + 4 T + a price
    recovery     W + M + B + 3 C + 8 T + a step
    edit         K-FADE: W + B + C + I + 2 T, the change and a gradient or a direction + a gradient,
                 a price, or the inversion of the longest factor; C and I are on the host where they
                 are offloaded, and a block's are on the device
    attack       W + M + B + C + 3 T + four copies of all parameters, masters for what is edited, +
                 a step; of K-FADE W + C + 2 T + four copies of all parameters + a step
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jedit.core.arguments import check_word
from jedit.core.checks import COUNT, COUNT_OR_ZERO, check_numbers
from jedit.core.paths import parameter_paths, selected_paths
from jedit.curvature import Curvature, Factorize
from jedit.curvature.memory import Footprint, group_paths
from jedit.geometry.trust_region import KEPT_BYTES
from jedit.methods import Ascent
from jedit.models.shapes import load_shapes
from jedit.recipes.folders.places import SELECT
from jedit.recipes.plan import programs
from jedit.recipes.plan.factors import (
    Kept,
    bytes_of,
    dropped,
    fetched_bytes,
    kept_factors,
    lookups_of,
    workspace,
)
from jedit.recipes.plan.programs import Cost, Model, Sizes
from jedit.requests.comeback import LESSON_STEPS, LESSONS
from jedit.requests.forget import HELD_OUT, MOST_HELD_OUT
from jedit.requests.unseen import CHUNK

Method = Literal["natural", "kfade"]
DEPTHS = (2, 4)  # layers of the models that are compiled; memory was linear from 2 to 16


class Phase(NamedTuple):
    """One part of an edit.

    Attributes:
        name: what is done.
        held: bytes of the arrays that it holds, on a device.
        temporaries: bytes that its largest program takes beside these.
        flops: floating-point operations, on all devices together.
    """

    name: str
    held: int
    temporaries: int
    flops: float

    @property
    def peak(self) -> int:
        """Return the most bytes that it holds at a time."""
        return self.held + self.temporaries


class Plan(NamedTuple):
    """What an edit needs; bytes are those of one device.

    Attributes:
        weights: parameters, as the folder has them.
        masters: what float32 adds to those that are edited.
        gradient: gradient of an edit's step, in the dtype of what is edited.
        edit: change of the parameters, in float32.
        sums: K-FAC's sums of the largest group.
        factors: factors, eigenbases and eigenvalues of all groups.
        num_groups: passes over the retain rows.
        largest_axis: longest side of a dense factor.
        kept: how the factors of each size are kept, and what their decompositions take.
        phases: the parts of the edit, in their order.
        num_devices: devices of the mesh.
        backend: whose compiler told the temporaries.
    """

    weights: int
    masters: int
    gradient: int
    edit: int
    sums: int
    factors: int
    num_groups: int
    largest_axis: int
    kept: tuple[Kept, ...]
    phases: tuple[Phase, ...]
    num_devices: int
    backend: str

    @property
    def peak(self) -> int:
        """Return the most bytes that a device holds at a time."""
        return self.at_peak.peak

    @property
    def at_peak(self) -> Phase:
        """Return the phase that holds most."""
        return max(self.phases, key=lambda phase: phase.peak)

    def seconds(self, rate: float) -> dict[str, float]:
        """Return the seconds of each phase, at so many flops a second of each device."""
        return {phase.name: phase.flops / rate / self.num_devices for phase in self.phases}


class Work(NamedTuple):
    """What is to be done, beside the model.

    Attributes:
        method: "natural", steps that stop by themselves, or "kfade", a few in closed form.
        select: regular expression of the parameters that are edited.
        forget: number of forget rows.
        retain: number of retain rows that it is given.
        max_len: tokens of a row.
        batch_size: rows of a step.
        steps: natural steps at most.
        recovery: steps after them.
        attack: whether the rows are taught again.
        factorize: how factors are kept, as `jedit.kfac` takes it.
        group_bytes: as `estimate` takes it.
        offload: as `estimate` takes it; of K-FADE alone.
    """

    method: Method = "natural"
    select: str = SELECT
    forget: int = 400
    retain: int = 2500
    max_len: int = 256
    batch_size: int = 8
    steps: int = 48
    recovery: int = 48
    attack: bool = True
    factorize: Factorize = Factorize("auto")
    group_bytes: int | None = None
    offload: bool = False


EVERY = 4  # natural steps between two looks, `Forgetting.every`
KFADE_STEPS = Ascent().steps  # those of the catalogue's K-FADE as well


def plan(
    folder: str | Path,
    work: Work = Work(),  # noqa: B008 - a tuple
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> Plan:
    """Tell what an edit of a model folder needs, without its weights.

        found = plan("models/Llama-3.2-1B", Work(method="kfade"))
        print(found.peak / 2**30, found.at_peak.name, found.seconds(60e12))

    The numbers are those of the edit itself, from loading to the `Edit`: judging the edited model
    takes less. The compiler asked is that of the default device, or of the mesh's. A CPU's widens
    bfloat16 for its products, which an accelerator's does not: there it takes less than is told
    here. A pattern that selects some layers has the temporaries and the flops of programs that
    select the same parameters in every layer, an upper bound; the arrays are those of the pattern.

    Args:
        folder: a folder with config.json; weights in it are not read, and need not be there.
        work: what is to be done.
        mesh: devices over which the parameters, and the rows by its axis "data", are split. They
            may be CPUs of one process, `jax.config.update("jax_num_cpu_devices", 8)`, for nothing
            is computed. None: one device.
        dtype: dtype of the parameters; None: as `load_shapes` says.

    Returns:
        The plan.

    Raises:
        ValueError: a folder that `load_shapes` refuses, a number out of its range, a pattern that
            matches no parameter, or `offload` with natural steps.
    """
    costs = asked(folder, work, mesh=mesh, dtype=dtype)
    return counted(costs, work)


class Asked(NamedTuple):
    """What was asked of a model: its shapes, and what the compiler says of its programs.

    Attributes:
        plain: the model as it is loaded.
        wide: the model with masters, as natural steps have it.
        state: shapes of K-FAC's sums.
        curvature: shapes of the curvature.
        footprints: sums of each block.
        costs: cost of each program, at the model's own depth; of the inversion of one factor, where
            some are inverted.
        outputs: bytes of the outputs of one row, on all devices together.
        num_devices: devices of the mesh.
        backend: whose compiler was asked.
        is_widened: whether a CPU's compiler was asked about numbers narrower than float32.
    """

    plain: Model
    wide: Model
    state: Any
    curvature: Curvature
    footprints: list[Footprint]
    costs: dict[str, Cost]
    outputs: int
    num_devices: int
    backend: str
    is_widened: bool


def asked(
    folder: str | Path, work: Work, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> Asked:
    """Ask the compiler; see `plan` for the arguments, of which groups change nothing here."""
    _check(work)
    length, sizes = work.max_len - 1, sizes_of(work)
    backend = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform

    def models(depth: int | None, select: str) -> tuple[Model, Model, int]:
        apply, params, config = load_shapes(folder, dtype=dtype, mesh=mesh, num_layers=depth)
        rows = programs.rows_of(length, mesh)
        plain = Model(apply, params, rows)
        if work.method == "kfade":
            return plain, plain, config.num_hidden_layers
        wide = Model(*programs.masters_of(apply, params, select), rows)
        return plain, wide, config.num_hidden_layers

    plain, wide, depth = models(None, work.select)
    depths, same = (depth,), work.select
    if depth > DEPTHS[-1]:
        depths = DEPTHS
        paths = [path for path, _ in parameter_paths(plain.params)]
        same = in_every_layer(selected_paths(paths, work.select))
    small = dataclasses.replace(sizes, select=same)
    lines = [_costs(models(d, same)[1], small, work, backend) for d in depths]
    first, last = lines[0], lines[-1]
    costs = {n: c.at(depths[0], last[n], depths[-1], depth) for n, c in first.items()}
    state, curvature = programs.curvature_of(wide, sizes)
    costs |= inversion_costs(curvature, backend)
    one = jax.eval_shape(plain.apply, plain.params, plain.rows(1).inputs)
    devices = 1 if mesh is None else mesh.size
    outputs = math.prod(one.shape) * one.dtype.itemsize
    footprints = state.footprints(wide.params)
    is_narrow = any(x.dtype.itemsize < 4 for x in jax.tree.leaves(plain.params))
    is_widened = is_narrow and backend == "cpu"
    asked_of = (costs, outputs, devices, backend, is_widened)
    return Asked(plain, wide, state, curvature, footprints, *asked_of)


def inversion_costs(curvature: Curvature, backend: str) -> dict[str, Cost]:
    """Ask what the longest inversion costs, under "inversion"; without one there is no cost."""
    traced = programs.inversion(curvature)
    return {} if traced is None else {"inversion": programs.cost_of(traced, backend)}


def in_every_layer(paths: Iterable[str]) -> str:
    """Return the pattern of the parameters of these kinds, in all layers."""
    kinds = dict.fromkeys(re.sub(r"^layers/\d+/", "layers/N/", path) for path in paths)
    found = (re.escape(kind).replace("layers/N/", r"layers/\d+/", 1) for kind in kinds)
    return "|".join(f"^{kind}$" for kind in found)


def sizes_of(work: Work) -> Sizes:
    """Return the numbers that a work's programs depend on."""
    # Natural steps take rows in chunks, and the price's are those of the forget rows' losses too.
    is_natural, seen = work.method == "natural", _seen(work)
    chunk = min(CHUNK if is_natural else work.batch_size, seen)
    return Sizes(
        select=work.select,
        forget=work.forget,
        retain=work.retain,
        batch_size=work.batch_size,
        chunk=chunk,
        priced=chunk if is_natural else min(work.batch_size, _held_out(work)),
        every=EVERY,
        factorize=work.factorize,
    )


def _costs(model: Model, sizes: Sizes, work: Work, backend: str) -> dict[str, Cost]:
    """Ask what the programs of a method cost, of a model of one depth."""
    traced = {"fit": programs.fit(model, sizes), "price": programs.price(model, sizes)}
    if work.method == "kfade":
        traced["gradient"] = programs.gradient(model, sizes)
        traced["quadratic"] = programs.quadratic(model, sizes)
    else:
        traced["step"] = programs.natural_step(model, sizes)
    if work.attack:
        lessons = -(-work.forget // LESSONS)
        traced["attack"] = programs.attack_step(model, sizes, steps=LESSON_STEPS, lessons=lessons)
    return {name: programs.cost_of(one, backend) for name, one in traced.items()}


def counted(found: Asked, work: Work) -> Plan:
    """Count the bytes and flops of an edit, of what was asked."""
    _check(work)
    weights = bytes_of(found.plain.params)
    edit = _edited_bytes(found.wide, work.select)
    factors = bytes_of(found.curvature)
    groups = _group_sizes(found.footprints, work.group_bytes)
    dense = [f for f in found.curvature.factors.values() if f.form != "diagonal"]
    lookups = lookups_of(found.state.blocks, found.curvature)
    kept_by = kept_factors(found.curvature, work.factorize, found.backend, lookups)
    # The caller keeps the narrow ones that masters are made of.
    masters = edit if bytes_of(found.wide.params) != weights else 0
    kept = _kept_outputs(found, work)
    # Natural steps have their price, and with it the outputs, from the start.
    base = weights + masters + (kept if work.method == "natural" else 0)
    passes = _passes(found, work)
    fit = _fit(
        base,
        groups,
        factors,
        dropped(dense, found.num_devices, streamed=work.factorize.streamed),
        workspace(dense, streamed=work.factorize.streamed),
        is_offloaded=work.offload,
    )
    phases = [
        Phase("fit", fit[0], found.costs["fit"].bytes, passes * found.costs["fit"].flops),
        Phase("decompose", fit[1], 0, sum(k.flops for k in kept_by if not k.is_solved)),
    ]
    # At the one damping of the edit.
    inverting = sum((k.flops for k in kept_by if k.is_solved), 0.0)
    rest = _kfade if work.method == "kfade" else _natural
    phases += rest(found, work, weights + masters + kept, edit, inverting)
    return Plan(
        weights=weights,
        masters=masters,
        gradient=_edited_bytes(found.wide, work.select, is_wide=False),
        edit=edit,
        sums=max(groups),
        factors=factors,
        num_groups=len(groups),
        largest_axis=max((factor.dimension for factor in dense), default=0),
        kept=kept_by,
        phases=tuple(phases),
        num_devices=found.num_devices,
        backend=found.backend,
    )


def _fit(
    base: int,
    groups: Sequence[int],
    factors: int,
    dropped: int,
    workspace: int,
    *,
    is_offloaded: bool,
) -> tuple[int, int]:
    """Return what is held while the sums are made, and while they are decomposed."""
    total, done = sum(groups), 0
    summing, decomposing = [], []
    for size in groups:
        before = 0 if is_offloaded else factors * done // total
        summing.append(base + before + size)
        # The sums stay until all moments and eigenbases of the group are made.
        made = (factors + dropped) * size // total
        decomposing.append(base + before + size + made + workspace)
        done += size
    return max(summing), max(decomposing)


def _natural(found: Asked, work: Work, base: int, edit: int, inverting: float) -> list[Phase]:
    costs, curvature = found.costs, bytes_of(found.curvature)
    step, price = costs["step"], costs["price"]
    looks = math.ceil(work.steps / EVERY)
    chunks = math.ceil(_held_out(work) / CHUNK) + math.ceil(work.forget / CHUNK)
    phases = [
        Phase(
            "natural",
            base + 5 * curvature + 4 * edit,
            step.bytes,
            work.steps / EVERY * step.flops + inverting,
        ),
        Phase("look", base + 3 * curvature + 4 * edit, price.bytes, looks * chunks * price.flops),
    ]
    if work.recovery:
        flops = work.recovery / EVERY * step.flops
        phases.append(Phase("recovery", base + 3 * curvature + 8 * edit, step.bytes, flops))
    if work.attack:
        whole = bytes_of(found.wide.params)
        held = base + curvature + 3 * edit + 4 * whole
        phases.append(Phase("attack", held, costs["attack"].bytes, costs["attack"].flops))
    return phases


def _kfade(found: Asked, work: Work, base: int, edit: int, inverting: float) -> list[Phase]:
    costs, curvature, inverses, fetched = found.costs, bytes_of(found.curvature), 0, 0
    if work.offload:
        fetched, curvature = fetched_bytes(found.curvature), 0
    else:
        inverses = programs.inverse_bytes(found.curvature)
    # And a batch of retain rows, for the cosine.
    batches = math.ceil(work.forget / work.batch_size) + 1
    priced = math.ceil(_held_out(work) / work.batch_size)
    # A search of a step's length looks seven times, beside the prices at its two ends.
    flops = batches * costs["gradient"].flops + 9 * priced * costs["price"].flops
    flops = KFADE_STEPS * (flops + 4 * costs["quadratic"].flops) + inverting
    of_factors = [fetched + costs[n].bytes for n in ("quadratic", "inversion") if n in costs]
    temporaries = max(costs["gradient"].bytes, costs["price"].bytes, *of_factors)
    phases = [Phase("edit", base + curvature + inverses + 2 * edit, temporaries, flops)]
    if work.attack:
        # The price and its outputs are gone; the edit, the edited parameters and Adam's are there.
        weights = bytes_of(found.plain.params)
        held = 5 * weights + curvature + 2 * edit
        phases.append(Phase("attack", held, costs["attack"].bytes, costs["attack"].flops))
    return phases


def _passes(found: Asked, work: Work) -> float:
    """Return how many batches the curvature is summed over."""
    groups = len(_group_sizes(found.footprints, work.group_bytes))
    return groups * _seen(work) / sizes_of(work).chunk


def _group_sizes(footprints: list[Footprint], group_bytes: int | None) -> list[int]:
    """Return the bytes of the sums of each group."""
    if group_bytes is None:
        return [sum({k: v for need in footprints for k, v in need.sums.items()}.values())]
    found = []
    for paths in map(set, group_paths(footprints, group_bytes)):
        mine = [need for need in footprints if paths & set(need.paths)]
        found.append(sum({k: v for need in mine for k, v in need.sums.items()}.values()))
    return found


def _seen(work: Work) -> int:
    """Return how many retain rows the curvature is of: the price is measured on the others."""
    return max(work.retain - _held_out(work), 1)


def _held_out(work: Work) -> int:
    return min(-(-work.retain // HELD_OUT), MOST_HELD_OUT)


def _kept_outputs(found: Asked, work: Work) -> int:
    """Return the bytes of the outputs that the price of a change is measured against, if kept."""
    size = _held_out(work) * found.outputs
    return size // found.num_devices if size <= KEPT_BYTES else 0


def _edited_bytes(model: Model, select: str, *, is_wide: bool = True) -> int:
    change = programs.changed(model, select)
    if is_wide:
        return bytes_of(change)
    return bytes_of(programs.edited(model, select))


def _check(work: Work) -> None:
    check_word(Method, method=work.method)
    names = ("forget", "retain", "batch_size", "steps", "group_bytes")
    check_numbers(COUNT, **{name: getattr(work, name) for name in names})
    check_numbers(COUNT_OR_ZERO, recovery=work.recovery)
    if work.max_len < 2:
        raise ValueError(f"max_len must be at least 2, an input and a target; got {work.max_len}")
    if work.offload and work.method == "natural":
        raise ValueError(
            "offload is of K-FADE alone: natural steps keep the curvature on the devices"
        )
