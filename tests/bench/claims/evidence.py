"""What every claim is written down with: intervals over seeds, versions, machine and date."""

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jedit.recipes.sweep import interval as interval  # all claims take it from here

OUT = Path("out/claims")


def shown(found: dict[str, Any], digits: int = 3) -> str:
    """An interval in a table: mean ± half width."""
    return f"{found['mean']:.{digits}g} ± {found['half_width']:.1g}"


def known_interval(values: Sequence[float]) -> dict[str, Any]:
    """The interval over the seeds that have the number, and how many these are under "seeds"."""
    known = [x for x in values if np.isfinite(x)]
    return interval(known or [np.nan]) | {"seeds": len(known)}


def shown_ratio(logs: dict[str, Any]) -> str:
    """Of an interval of logarithms: the geometric mean, with its bounds."""
    low, high = np.exp([logs["mean"] - logs["half_width"], logs["mean"] + logs["half_width"]])
    return f"{np.exp(logs['mean']):.2f} ({low:.2f}-{high:.2f})"


def parser(doc: str | None, *, seeds: int = 5) -> argparse.ArgumentParser:
    """The options that every claim has."""
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seeds", type=int, default=seeds, help="how many, counted from 0")
    options.add_argument("--out", type=Path, default=OUT, help="folder of the numbers and figure")
    return options


def kept(path: Path, settings: dict[str, Any], make: Callable[[], dict]) -> dict[str, Any]:
    """Return one seed's numbers, read where they were made at the same settings, or made anew."""
    settings = json.loads(json.dumps(settings))  # as they are read again: tuples are lists
    if path.exists():
        record = json.loads(path.read_text())
        if record.get("settings") == settings:
            return record
        print(f"{path} was made at other settings: made anew", file=sys.stderr, flush=True)
    record = make() | {"settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def write(name: str, out: Path, numbers: dict[str, Any]) -> Path:
    """Write the numbers, with what they were made by, to `out`/NAME.json."""
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(["python", "-m", f"tests.bench.claims.{name}", *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__, "optax": optax.__version__, "numpy": np.__version__},
        **numbers,
    }
    path = out / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
