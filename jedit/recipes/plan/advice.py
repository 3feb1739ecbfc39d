"""What to change where an edit does not fit, each change with what it comes to."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh
from jax.typing import DTypeLike

from jedit.core.paths import parameter_paths, selected_paths
from jedit.curvature import Factorize
from jedit.recipes.plan import programs
from jedit.recipes.plan.plan import Asked, Plan, Work, asked, counted, inversion_costs, sizes_of

LEAST = 0.99  # of the peak: what saves less is not said
PARTS = (2, 4, 8, 16, 32)  # into which sums and layers are parted; arbitrary
# How `jedit forget` is not told it.
IN_PYTHON = {
    "natural": "(in Python: estimate(...), then Natural(curvature=...))",
    "kfade": "(in Python: estimate(...), then kfade)",
}
RANKS = (1024, 256, 64)  # arbitrary
MUCH = 0.3  # of the peak, in temporaries: then rows are made fewer or shorter


class Advice(NamedTuple):
    """One change.

    Attributes:
        text: what to do, as the beginning of a sentence.
        work: the work with the change.
        plan: what it comes to; of fewer layers the temporaries are those of all, an upper bound.
    """

    text: str
    work: Work
    plan: Plan


def advice(
    folder: str | Path,
    work: Work,
    found: Asked,
    limit: float,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> list[Advice]:
    """Return the changes that lower an edit's peak, those that let it fit first.

    Args:
        folder: the folder that was planned.
        work: the work that was planned.
        found: what was asked of the compiler for it.
        limit: bytes that a device has.
        mesh: the mesh that was planned with.
        dtype: the dtype that was planned with.

    Returns:
        Of each kind of change the mildest that fits, or else the strongest that lowers the peak.
    """
    before = counted(found, work)
    again = {"mesh": mesh, "dtype": dtype}
    made: list[Advice] = []
    kinds = (
        _without_attack(work, found),
        _in_groups(work, found, before),
        _offloaded(work, found),
        _without_eigenvectors(folder, work, before, again),
        _of_a_rank(folder, work, before, again),
        _diagonal(work, found, before),
        _fewer_layers(work, found),
        _smaller_rows(folder, work, before, again),
        _closed_form(folder, work, again),
    )
    for kind in kinds:
        best = None
        for one in kind:
            if one.plan.peak < LEAST * (before.peak if best is None else best.plan.peak):
                best = one
            if best is not None and best.plan.peak <= limit:
                break
        if best is not None:
            made.append(best)
    return sorted(made, key=lambda one: (one.plan.peak > limit, one.plan.peak))


def _without_attack(work: Work, found: Asked) -> Iterator[Advice]:
    if work.attack:
        yield _changed("no attack on the result (--no-attack)", work, found, attack=False)


def _in_groups(work: Work, found: Asked, before: Plan) -> Iterator[Advice]:
    if work.group_bytes is not None:
        return
    for parts in PARTS:
        size = -(-before.sums // parts)
        text = f"group_bytes={size}"
        if work.method == "kfade":
            text = f"{text} with offload=True {IN_PYTHON['kfade']}"
            yield _changed(text, work, found, group_bytes=size, offload=True)
        else:
            yield _changed(f"{text} {IN_PYTHON['natural']}", work, found, group_bytes=size)


def _offloaded(work: Work, found: Asked) -> Iterator[Advice]:
    if work.method == "kfade" and not work.offload:
        text = f"offload=True, factors in the host's memory {IN_PYTHON['kfade']}"
        yield _changed(text, work, found, offload=True)


def _without_eigenvectors(
    folder: str | Path, work: Work, before: Plan, again: dict
) -> Iterator[Advice]:
    if any(k.form == "eigh" or "eigenvectors" in k.form for k in before.kept):
        how = Factorize("cholesky", max_dim=work.factorize.max_dim)
        yield _asked_again("--factorize cholesky, no eigenvectors", folder, work, how, again)


def _of_a_rank(folder: str | Path, work: Work, before: Plan, again: dict) -> Iterator[Advice]:
    if work.factorize.rank is not None:
        return
    for rank in RANKS:
        if 4 * rank < before.largest_axis:  # else it would be no cheaper than all of them
            how = Factorize(rank=rank, max_dim=work.factorize.max_dim)
            text = f"--rank {rank}, the leading eigenvectors alone"
            yield _asked_again(text, folder, work, how, again)


def _asked_again(text: str, folder: str | Path, work: Work, how: Factorize, again: dict) -> Advice:
    """Return a change of how factors are kept: its programs are others."""
    changed = work._replace(factorize=how)
    return Advice(text, changed, counted(asked(folder, changed, **again), changed))


def _diagonal(work: Work, found: Asked, before: Plan) -> Iterator[Advice]:
    sides = {f.dimension for f in found.curvature.factors.values() if f.form != "diagonal"}
    for side in sorted(sides, reverse=True)[1:]:
        changed = work._replace(factorize=dataclasses.replace(work.factorize, max_dim=side))
        yield Advice(
            f"--max-dim {side}, factors of longer axes (up to {before.largest_axis}) diagonal",
            changed,
            counted(_with_curvature(found, changed), changed),
        )


def _fewer_layers(work: Work, found: Asked) -> Iterator[Advice]:
    """Yield edits of the layers in the middle, half of those that are selected, and fewer."""
    paths = [path for path, _ in parameter_paths(found.plain.params)]
    chosen = selected_paths(paths, work.select)
    layers = sorted({int(m[1]) for path in chosen if (m := re.match(r"layers/(\d+)/", path))})
    for parts in PARTS:
        number = len(layers) // parts
        if not number:
            return
        begin = (len(layers) - number) // 2
        some = layers[begin : begin + number]
        select = _pattern(paths, chosen, some)
        changed = work._replace(select=select)
        name = f"layers {some[0]} to {some[-1]}" if number > 1 else f"layer {some[0]}"
        yield Advice(
            f"{name} alone (--select '{select}')",
            changed,
            counted(_with_curvature(found, changed), changed),
        )


def _pattern(paths: list[str], chosen: list[str], layers: list[int]) -> str:
    """Return a pattern of the chosen parameters in some layers: of whole parts, where it can be."""
    begin = rf"^layers/({'|'.join(map(str, layers))})/"
    wanted = [path for path in chosen if re.search(begin, path)]
    inner = [re.sub(r"^layers/\d+/", "", path) for path in wanted]
    parts = dict.fromkeys(re.escape(path.partition("/")[0]) for path in inner)
    short = f"{begin}({'|'.join(parts)})/"
    if selected_paths(paths, short) == wanted:
        return short
    return f"{begin}({'|'.join(map(re.escape, dict.fromkeys(inner)))})$"


def _smaller_rows(folder: str | Path, work: Work, before: Plan, again: dict) -> Iterator[Advice]:
    if before.at_peak.temporaries < MUCH * before.peak:
        return
    for name, least in (("batch_size", 1), ("max_len", 32)):
        size = getattr(work, name) // 2
        if size < least:
            continue
        changed = work._replace(**{name: size})
        plan = counted(asked(folder, changed, **again), changed)
        yield Advice(f"--{name.replace('_', '-')} {size}", changed, plan)


def _closed_form(folder: str | Path, work: Work, again: dict) -> Iterator[Advice]:
    if work.method == "natural":
        changed = work._replace(method="kfade")
        plan = counted(asked(folder, changed, **again), changed)
        yield Advice("--method kfade, some steps in closed form", changed, plan)


def _changed(text: str, work: Work, found: Asked, **changes: object) -> Advice:
    changed = work._replace(**changes)
    return Advice(text, changed, counted(found, changed))


def _with_curvature(found: Asked, work: Work) -> Asked:
    """Return what was asked, with the curvature that another work has."""
    sizes = sizes_of(work)
    state, curvature = programs.curvature_of(found.wide, sizes)
    footprints = state.footprints(found.wide.params)
    costs = {name: cost for name, cost in found.costs.items() if name != "inversion"}
    costs |= inversion_costs(curvature, found.backend)
    return found._replace(state=state, curvature=curvature, footprints=footprints, costs=costs)
