"""`python -m tests.bench.gpu_run.machine --json FILE`: what machine a run is on."""

import argparse
from pathlib import Path

import jax

from jedit.recipes.environment import machine, versions
from tests.bench.gpu_run.stages import write_json


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--toy", action="store_true", help="changes nothing")
    device = jax.devices()[0]
    told = device.memory_stats() or {}
    found = {
        "platform": device.platform,
        "kind": device.device_kind,
        "capability": str(getattr(device, "compute_capability", "")),
        "bytes": told.get("bytes_limit"),
        "machine": machine(),
        "versions": versions(),
    }
    write_json(options.parse_args(arguments).json, found)


if __name__ == "__main__":
    main()
