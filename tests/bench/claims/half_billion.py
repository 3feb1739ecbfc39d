"""Claim: half a billion parameters are fitted and edited within weights + one group's sums + 3 GiB.

    python -m tests.bench.claims.half_billion [--group-mib 512]      (in .venv-llm)

A folder of Qwen2.5-0.5B's shape with random numbers in bfloat16 (494M parameters, `loading`'s) is
loaded, the K-FAC curvature of all attention and MLP matrices is fitted group by group, one K-FADE
step is taken at a budget of true retain KL, the edit is evaluated and saved as a folder: in one
fresh process, whose peak of resident memory is read phase by phase (VmHWM, files' pages included).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.claims.evidence import OUT, write
from tests.bench.claims.loading import SIZES, make

MATRICES = r"layers/\d+/(attn/[qkvo]_proj/w|mlp/(gate|up|down)_proj/kernel)$"
ROWS, LENGTH = 8, 128


def status_gib(field: str) -> float:
    """A line of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 2**20


class Phases:
    """Seconds and peak of resident memory of each phase."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        start = time.perf_counter()
        yield
        row = {
            "seconds": round(time.perf_counter() - start, 1),
            "peak GiB": round(status_gib("VmHWM"), 2),
            "after GiB": round(status_gib("VmRSS"), 2),
        }
        self.found[name] = row
        print(name, row, file=sys.stderr, flush=True)


def rows(seed: int) -> Any:
    import jax.numpy as jnp
    import numpy as np

    import jedit

    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, SIZES["vocab_size"], (ROWS, LENGTH + 1))
    return jedit.Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))


def child(folder: Path, out: Path, group_bytes: int, max_dim: int) -> dict[str, Any]:
    import jax

    import jedit
    from jedit.models import load_model, save_model

    phases = Phases()
    with phases("load"):
        apply, params, _ = load_model(folder)
        jax.block_until_ready(params)
    forget, retain, unseen = rows(0), rows(1), rows(2)
    likelihood = jedit.likelihoods.Categorical()
    estimator = jedit.kfac(apply, likelihood, select=MATRICES, max_dim=max_dim)
    with phases("fit"):
        curvature = jedit.estimate(
            estimator,
            params,
            [retain],
            key=jax.random.key(0),
            group_bytes=group_bytes,
            offload=True,
        )
    with phases("edit"):
        ascent = jedit.methods.Ascent(steps=1)
        edit, info = jedit.methods.kfade(
            apply, params, curvature, forget, [retain], budget=0.01, ascent=ascent
        )
    with phases("evaluate"):
        edited = jedit.apply_edit(params, edit)
        print(info, jedit.metrics.output_kl(apply, params, edited, unseen))
    with phases("save"):
        save_model(edited, out, source=folder)
    return phases.found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--group-mib", type=int, default=512)
    options.add_argument("--max-dim", type=int, default=1024)
    given = options.parse_args()
    folder = given.out / "loading" / "qwen2.5-0.5b"
    make(folder)
    child(folder, given.out / "half_billion", given.group_mib * 2**20, given.max_dim)


if __name__ == "__main__":
    main()
