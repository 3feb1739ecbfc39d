"""The real thing on an accelerator, timed: train, retrain, fit, edit and evaluate, dtype by dtype.

What is run is TOFU's "gpu" preset, a GPT of 100 million parameters on all rows; a toy of it runs
anywhere. Each step is called once on as little as compiles the same programs, and then timed.
"""

import dataclasses
import functools
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from jedit.data import pack
from jedit.recipes.environment import machine, versions
from jedit.recipes.fitting import Recipe
from jedit.recipes.progress import Say
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.models import small_gpt
from jedit.recipes.tofu.presets import PRESETS, Preset
from jedit.recipes.tofu.run import Sets, compare_key, invented_sets, prepare, read_sets
from jedit.report.results import plain
from jedit.report.table import number, share
from tests.bench.gpu_run.bench_steps import edit_and_judge, fit, timed_training
from tests.bench.gpu_run.rates import matmul_rates, moment_rates, peak_gib
from tests.bench.gpu_run.stages import write_json

BENCH_OUT, RESULTS = Path("out/bench"), "bench.json"
TARGET = 0.6  # of the matmul rate, for the factors in bfloat16


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Time training, curvature, edit and evaluation of a 100M GPT on TOFU, on an accelerator."""

    gpu: bool = False
    """The whole run, on the first device that JAX sees; it must be no CPU."""
    toy: bool = False
    """Tiny sizes instead, on any device: to see that it works."""
    data: str | None = None
    """TOFU's folder (full.json, ...), or its name on the hub, locuslab/TOFU. None: as many rows of
    invented authors stand in, and the results say so."""
    dtype: Literal["both", "bfloat16", "float32"] = "both"
    """Of the model's computation; parameters and statistics are float32."""
    out: Path = BENCH_OUT
    """Folder of bench.json; an earlier one there is replaced."""
    seed: int = 0
    """Of everything random."""


class Size(NamedTuple):
    """How large a run is.

    Attributes:
        preset: of TOFU; its dtype is the option's.
        facts: questions about each author, where authors are invented.
        matmul: rows of the square matrices whose product's rate is measured.
    """

    preset: Preset
    facts: int
    matmul: int


WHOLE = Size(PRESETS["gpu"], facts=20, matmul=8192)
TOY = Size(
    PRESETS["gpu"]._replace(
        authors=22,
        forgotten=1,
        questions=4,
        model=Model(width=16, layers=1, heads=2, vocab=400, max_len=160),
        recipe=Recipe(epochs=(1,), batch_size=8, learning_rate=1e-3),
    ),
    facts=2,
    matmul=128,
)


def sets_of(options: BenchOptions) -> Sets:
    """Check the options and read the rows.

    Raises:
        ValueError: there is no accelerator for the whole run, neither run was chosen, `out` cannot
            be a folder, or the data cannot be read.
    """
    if not (options.gpu or options.toy):
        raise ValueError("bench needs --gpu, the whole run, or --toy, tiny sizes on any device")
    if not options.toy and jax.default_backend() == "cpu":
        raise ValueError(
            "--gpu needs an accelerator, and JAX sees none here; --toy runs tiny sizes on any "
            "device"
        )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out}: is a file; --out names a folder")
    size = TOY if options.toy else WHOLE
    if options.data is None:
        return invented_sets(size.preset, seed=options.seed, facts_per_author=size.facts)
    return read_sets(options.data, size.preset)


def run_bench(options: BenchOptions, sets: Sets, *, command: str, say: Say) -> dict[str, Any]:
    """Run in each dtype, and write bench.json after each: a run that is stopped keeps what it has.

    Args:
        options: what to run.
        sets: of `sets_of`.
        command: as it was typed.
        say: told of each stage.

    Returns:
        What was written, as plain JSON values. Seconds, GiB, flops a second, nats an output.
    """
    size = TOY if options.toy else WHOLE
    both = ("bfloat16", "float32")
    found: dict[str, Any] = {
        "schema": "jedit.bench/1",
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": options.seed,
        "versions": versions(),
        "machine": machine(),
        "device": {
            "platform": jax.devices()[0].platform,
            "kind": jax.devices()[0].device_kind,
            "tells_memory": peak_gib() is not None,
        },
        "is_toy": options.toy,
        "data": options.data or "invented authors, in place of TOFU",
        "num_rows": {name: len(rows) for name, rows in sets._asdict().items()},
        "target_share": TARGET,
        "runs": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for dtype in both if options.dtype == "both" else (options.dtype,):
        before = found["runs"]

        def keep(run: dict[str, Any], before: list = before) -> None:
            write_json(options.out / RESULTS, found | {"runs": [*before, plain(run)]})

        run = _run(sets, size, dtype, seed=options.seed, say=say, keep=keep)
        keep(run)
        found["runs"] = [*before, plain(run)]
    return found


def _run(
    sets: Sets,
    size: Size,
    dtype: str,
    *,
    seed: int,
    say: Say,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """One dtype, from the first parameters to the last evaluation; parts are kept on the way."""
    preset = size.preset._replace(dtype=dtype)
    assert isinstance(preset.model, Model)
    # The models are trained here, as `prepare` would, which does not tell compiling from training.
    init_key, order_key = (jax.random.fold_in(jax.random.key(seed), i) for i in range(2))
    kept = [*sets.kept, *sets.general]
    begin = small_gpt([*sets.forget, *kept], preset.model, dtype, key=init_key)
    steps, trained = [], {}
    for name, rows in (("train", [*sets.forget, *kept]), ("retrain", kept)):
        say(f"{dtype}: {name}ing on {len(rows)} rows")
        encoded = begin.model.encode([(row.question, row.answer) for row in rows])
        sequences = pack(encoded, begin.model.max_len).batch
        trained[name], step = timed_training(
            begin.model.apply, begin.params, sequences, preset.recipe, key=order_key
        )
        steps.append(step._replace(name=name, rows=(step.rows or 0) * len(rows)))
        keep({"dtype": dtype, "model": begin.description, "steps": steps})
    begin = begin._replace(params=trained["train"], retrained=trained["retrain"])
    task = prepare(sets, preset, seed=seed, say=say, begin=begin).task
    say(f"{dtype}: fitting K-FAC and EK-FAC on {len(sets.seen)} rows")
    rates = functools.partial(matmul_rates, dtype, size.matmul)
    temperature = preset.grid.temperatures[0]
    is_narrow = dtype != "float32"
    fitted = fit(task, temperature, rates, is_narrow=is_narrow, key=compare_key(seed))
    rows = (fitted.positions, max(map(max, fitted.matrices)))
    run = {
        "dtype": dtype,
        "model": begin.description,
        "recipe": str(preset.recipe),
        "num_matrices": len(fitted.matrices),
        "positions_of_a_batch": fitted.positions,
        "flops_per_position": fitted.flops,
        "matmul_rates": fitted.rates,
        "moment_rates": moment_rates(dtype, rows),
        "steps": [*steps, *fitted.steps],
    }
    keep(run)
    say(f"{dtype}: editing and evaluating")
    edited, points = edit_and_judge(task, fitted.curvature, preset.grid.damping[0])
    return run | {"steps": [*run["steps"], *edited], "points": points}


def show(found: dict[str, Any], out: Path) -> None:
    """Print what `run_bench` found and wrote to `out`."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=120, highlight=False)
    toy = " A toy: its numbers say nothing but that it runs." if found["is_toy"] else ""
    console.print(f"{found['device']['kind']}; {found['data']}; seed {found['seed']}.{toy}")
    for run in found["runs"]:
        console.print()
        console.print(_steps_table(run))
        console.print(_rates_line(run))
        if run["dtype"] == "bfloat16" and not found["is_toy"]:
            (reached,) = (step["share"] for step in run["steps"] if step["name"] == "factors")
            target = found["target_share"]
            console.print(f"Factors: {reached:.1%} of the bfloat16 rate; the aim is {target:.0%}.")
        console.print(_points_table(run))
    if not found["device"]["tells_memory"]:
        console.print("This device does not tell its peak memory.")
    console.print(f"\nNumbers: {out / RESULTS}", soft_wrap=True)


def _steps_table(run: dict[str, Any]) -> Table:
    table = Table(title=f"{run['dtype']}: {run['model']}", title_justify="left")
    headings = (
        "",
        "first call\n(compiles), s",
        "then, s",
        "rows/s",
        "tokens/s",
        "peak so far\nGiB",
    )
    headings += ("floor, % of\nthe rate", "with float32\nstatistics")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for step in run["steps"]:
        speeds = [
            None if step[k] is None else step[k] / step["seconds"] for k in ("rows", "tokens")
        ]
        measured = (step["first_seconds"], step["seconds"], *speeds, step["peak_gib"])
        shares = (step["share"], step["share_of_both"])
        table.add_row(step["name"], *map(number, measured), *map(share, shares))
    return table


def _rates_line(run: dict[str, Any]) -> str:
    tera = {name: number(rate / 1e12) for name, rate in run["matmul_rates"].items()}
    moments = (f"{k} {number(rate / 1e12)}" for k, rate in run["moment_rates"].items())
    return (
        f"Square products, Tflop/s: {run['dtype']} {tera['peak']}, float32 at full precision "
        f"{tera['full']}. A moment of the widest rows: {', '.join(moments)}."
    )


def _points_table(run: dict[str, Any]) -> Table:
    columns = ("forget_nll", "heldout_nll", "heldout_kl", "forget_kl", "forget_quality")
    columns += ("model_utility",)
    table = Table()
    for heading in ("", *(name.replace("_", " ") for name in columns)):
        table.add_column(heading, justify="right" if heading else "left")
    for name, point in run["points"].items():
        table.add_row(name, *(number(point[column]) for column in columns))
    return table
