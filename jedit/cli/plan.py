"""`jedit plan`: what an edit of a model folder will need, before it is made."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from jedit.cli.checks import UsageError
from jedit.cli.mesh import mesh_axes
from jedit.cli.options import Factors
from jedit.cli.rows import factorize_of
from jedit.core.checks import POSITIVE, check_numbers

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from rich.table import Table

    from jedit.recipes.plan.plan import Plan

GIB = 2**30
LONG = 65536  # columns beyond which an axis is a vocabulary's, whose diagonal nobody wonders at
MOST_DEVICES = 4096  # each of them an object in this process; arbitrary


@dataclass(frozen=True)
class PlanOptions:
    """Tell what an edit of a model folder needs of each device, and what to change if it is much.

    Bytes and seconds of each phase, without the weights, which need not be there.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the model (Hugging Face); config.json is enough."""
    select: str | None = None
    """Regular expression of the parameters that are edited; None: the matrices of the blocks."""
    mesh: str | None = None
    """Devices that share it, such as data=4,model=2; they need not be there."""
    method: Literal["natural", "kfade"] = "natural"
    """As `jedit forget` takes it."""
    forget: int = 400
    """Number of rows to forget."""
    retain: int = 2500
    """Number of retain rows that the edit sees."""
    max_len: int = 256
    """Tokens of a row."""
    batch_size: int = 8
    """Rows of a step."""
    steps: int = 48
    """Natural steps at most."""
    recovery: int = 48
    """Steps after the natural ones; 0: none."""
    attack: bool = True
    """Whether some rows are taught again after the edit."""
    factorize: Factors | None = None
    """How factors of the curvature are kept, as `jedit forget` takes it. None: auto, or with --rank
    eigh."""
    rank: int | None = None
    """Leading eigenvectors that are kept of a factor; of long ones alone with --factorize auto."""
    max_dim: int = 16384
    """Longest axis that gets a dense factor, as `jedit forget` takes it."""
    group_bytes: int | None = None
    """Bytes of a group's sums on a device, as `jedit.estimate` takes it; None: all at once. In
    Python alone: estimate(...), then Natural(curvature=...) or kfade."""
    offload: bool = False
    """With kfade: factors lie in the host's memory. In Python alone: estimate(...), then kfade."""
    memory: float | None = None
    """GiB of a device; None: those of this machine's accelerator, if it has one."""
    rate: float | None = None
    """Flops a second of a device; None: this device's, measured by a float32 product."""


def plan_command(options: PlanOptions, command: str) -> int:
    """Print the plan that the options ask for; return the exit code.

    Raises:
        UsageError: a mistake that the user can mend.
    """
    del command
    mesh = None if options.mesh is None else _mesh_of(options.mesh)
    try:
        check_numbers(POSITIVE, **{"--memory": options.memory, "--rate": options.rate})
        return _planned(options, mesh)
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(str(error)) from None


def _planned(options: PlanOptions, mesh: "Mesh | None") -> int:
    from rich.console import Console

    from jedit.recipes.environment import matmul_rate
    from jedit.recipes.folders.places import SELECT
    from jedit.recipes.plan.advice import advice
    from jedit.recipes.plan.plan import Work, asked, counted

    own = {"select": options.select or SELECT, "factorize": factorize_of(options)}
    given = {name: getattr(options, name) for name in Work._fields if name not in own}
    work = Work(**own, **given)
    found = asked(options.folder, work, mesh=mesh)
    plan = counted(found, work)
    rate = matmul_rate() if options.rate is None else options.rate
    limit = _device_memory() if options.memory is None else options.memory * GIB
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for table in _tables(plan, rate):
        console.print(table)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    for text in _of_factors(plan, rate):
        say(text)
    peak = f"{plan.peak / GIB:.3g} GiB a device, in {plan.at_peak.name}"
    if found.is_widened:
        say(
            "Temporaries are those of this CPU's compiler, which widens the weights' dtype for its "
            "products; an accelerator's takes less."
        )
    if limit is None:
        say(f"Most at a time: {peak}. Give --memory GIB to be told whether it fits.")
        return 0
    room = f"{limit / GIB:.3g} GiB"
    if plan.peak <= limit:
        say(f"It fits in {room}: most at a time are {peak}.")
        return 0
    say(f"It does not fit in {room}: most at a time are {peak}. What to change:")
    for one in advice(options.folder, work, found, limit, mesh=mesh):
        fits = "fits" if one.plan.peak <= limit else "does not fit by itself"
        passes = "" if one.plan.num_groups == 1 else f"{one.plan.num_groups} passes, "
        say(f"- {one.text}: {passes}{one.plan.peak / GIB:.3g} GiB a device, {fits}")
    say(
        f"- more devices (--mesh): {math.ceil(plan.peak / limit) * plan.num_devices} at least, "
        "where all is split evenly"
    )
    return 0


def _tables(plan: "Plan", rate: float) -> list:
    from rich.table import Table

    parts = Table(title="Bytes of a device", title_justify="left")
    parts.add_column("")
    parts.add_column("GiB", justify="right")
    for name in ("weights", "masters", "gradient", "edit", "sums", "factors"):
        parts.add_row(name, f"{getattr(plan, name) / GIB:.3g}")
    phases = Table(
        title=f"Phases, at {rate / 1e12:.3g} Tflop/s of each device", title_justify="left"
    )
    phases.add_column("")
    for heading in ("arrays, GiB", "temporaries, GiB", "peak, GiB", "seconds"):
        phases.add_column(heading, justify="right")
    seconds = plan.seconds(rate)
    for phase in plan.phases:
        sizes = (phase.held, phase.temporaries, phase.peak)
        row = [f"{size / GIB:.3g}" for size in sizes]
        phases.add_row(phase.name, *row, f"{seconds[phase.name]:.3g}")
    return [parts, phases, _factors_table(plan, rate)]


def _factors_table(plan: "Plan", rate: float) -> "Table":
    from rich.table import Table

    table = Table(title="Factors of the curvature", title_justify="left")
    table.add_column("columns", justify="right")
    table.add_column("matrices", justify="right")
    table.add_column("kept by")
    for heading in ("GiB", "Tflop", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("why")
    for k in plan.kept:
        numbers = (k.bytes / GIB, k.flops / 1e12, k.flops / rate / plan.num_devices)
        why = f"{k.why}; at each damping" if k.is_solved else k.why
        table.add_row(f"{k.side:,}", f"{k.number}", k.form, *(f"{x:.3g}" for x in numbers), why)
    return table


def _of_factors(plan: "Plan", rate: float) -> list[str]:
    """Return what is to be said of factors that take long, or that some library cannot take."""
    said = []
    hours = plan.seconds(rate)["decompose"] / 3600
    dense = (k for k in plan.kept if k.form != "diagonal")
    solved = sum(k.number * float(k.side) ** 3 / 3 for k in dense) / rate / plan.num_devices
    if hours >= 1:
        said.append(
            f"Decompositions take {hours:.3g} hours at this rate; --factorize cholesky takes none, "
            f"and some {solved:.3g} s at each damping."
        )
    for k in plan.kept:
        if k.limit is not None:
            said.append(
                f"Factors of {k.side:,} columns are more than {k.limit.library} takes "
                f"({k.limit.columns:,}): there the edit is refused before its first batch. Give "
                "--factorize auto or cholesky, or --rank."
            )
        if k.form == "diagonal" and not k.is_lookup and k.side <= LONG:
            said.append(
                f"Axes of {k.side:,} columns get diagonal factors; --max-dim {k.side} makes them "
                "dense, without eigenvectors where --factorize auto finds them long."
            )
    return said


def _mesh_of(text: str) -> "Mesh":
    """Make a mesh of CPUs, as many as the text names: they are compiled for, and hold nothing.

    Raises:
        UsageError: what `mesh_axes` refuses, more than `MOST_DEVICES`, or no CPUs, or too few of
            them in a process that had begun.
    """
    import jax

    axes = mesh_axes(text)
    number = math.prod(axes.values())
    if number > MOST_DEVICES:
        raise UsageError(f"--mesh {text}: takes {number} devices; at most {MOST_DEVICES} can be.")
    with contextlib.suppress(RuntimeError):  # JAX has begun; there may be enough
        jax.config.update("jax_num_cpu_devices", number)
    try:
        devices = jax.devices("cpu")
    except RuntimeError:  # as under JAX_PLATFORMS=cuda
        raise UsageError(
            f"--mesh {text}: is planned with this machine's CPUs, and JAX has none; set "
            "JAX_PLATFORMS=cpu, or add cpu to it."
        ) from None
    if number > len(devices):
        raise UsageError(f"--mesh {text}: takes {number} devices; there are {len(devices)}.")
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices[:number]
    )


def _device_memory() -> float | None:
    """Return the bytes of an accelerator; None: there is none, or it does not say."""
    import jax

    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return None if stats is None else stats.get("bytes_limit")
