"""Claim: half a billion parameters are fitted and edited within weights + one group's sums + 3 GiB.

    python -m tests.bench.claims.half_billion [--group-mib 128]      (in .venv-llm)

A folder of Qwen2.5-0.5B's shape with random numbers in bfloat16 (494M parameters, `loading`'s) is
loaded, the K-FAC curvature of all attention and MLP matrices (358M parameters) is fitted group by
group, one K-FADE step is taken in it at a budget of true retain KL, group by group as well, and the
edit is evaluated and saved as a folder: all in one fresh process, whose peak of resident memory is
read phase by phase (VmHWM: Python, compiled programs and files' pages included).  Beside it one
layer with dense factors of its 4864-wide axes too, in a process of its own.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.claims.evidence import OUT, write
from tests.bench.claims.loading import SIZES, make

MATRICES = r"layers/\d+/(attn/[qkvo]_proj/w|mlp/(gate|up|down)_proj/kernel)$"
ROWS, LENGTH = 4, 128
BUDGET = 0.01
# A CPU multiplies bfloat16 as float32: XLA widens every weight before a loop over rows, and keeps
# it for the backward pass, unless these two passes are left out.
PASSES = "while-loop-invariant-code-motion,cse_barrier_expander"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_disable_hlo_passes={PASSES}",
    # What is freed goes back to the system, and is not kept for the next array of that size.
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
}


def matmul_rate(dtype: Any) -> float:
    """Multiply-adds a second, twice, of this process's matrix product, best of five."""
    import jax
    import jax.numpy as jnp

    a, b = jnp.ones((1024, 896), dtype), jnp.ones((896, 4864), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 * 896 * 4864 / min(seconds)


def nbytes(tree: Any) -> int:
    import jax

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def flops_of_fit(params: Any, groups: list[list[str]], sums: int) -> float:
    """Forward and backward passes over the retain rows, a pair a group, and all moments once.

    A group's backward pass ends at its lowest layer.
    """
    from jedit.core.paths import parameter_paths

    tokens = ROWS * LENGTH
    sizes = {path: math.prod(x.shape) for path, x in parameter_paths(params) if x.ndim > 1}
    head = sizes["embedder/input_embedding"]
    layer_of = {path: int(path.split("/")[1]) for path in sizes if path.startswith("layers/")}
    total = 2.0 * tokens * sums / 4
    for paths in groups:
        lowest = min(layer_of[path] for path in paths)
        above = sum(sizes[path] for path, layer in layer_of.items() if layer >= lowest)
        total += 2.0 * tokens * (sum(sizes.values()) + head + above)
    return total


def rows(seed: int) -> Any:
    import jax.numpy as jnp
    import numpy as np

    import jedit

    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, SIZES["vocab_size"], (ROWS, LENGTH + 1))
    return jedit.Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))


def child(folder: Path, out: Path, group_bytes: int, max_dim: int, select: str) -> dict[str, Any]:
    import jax

    import jedit
    from jedit.metrics import nll, output_kl
    from jedit.models import load_model, save_model
    from tests.bench.gpu_run.phases import Phases

    phases = Phases()
    rates = {"bfloat16": matmul_rate("bfloat16"), "float32": matmul_rate("float32")}
    with phases("load"):
        apply, params, _ = load_model(folder, remat=True)
        jax.block_until_ready(params)
    forget, retain, unseen = rows(0), rows(1), rows(2)
    key = jax.random.key(0)
    likelihood = jedit.likelihoods.Categorical()
    how = jedit.Factorize(max_dim=max_dim)
    estimator = jedit.kfac(apply, likelihood, select=select, factorize=how)
    groups = estimator.groups(params, retain, group_bytes)
    states = [jax.eval_shape(one.init, params, retain) for one in groups]
    sums = [nbytes((state.inputs, state.outputs)) for state in states]
    paths = [[path for block in state.blocks for path in block.weight.paths] for state in states]
    given = {"key": key, "group_bytes": group_bytes}
    with phases("fit, offloaded"):
        curvature = jedit.estimate(estimator, params, [retain], offload=True, **given)
        jax.block_until_ready(curvature)
    factors = nbytes(curvature)
    del curvature
    with phases("fit and edit in groups"):
        parts = jedit.estimate_in_groups(estimator, params, [retain], **given)
        ascent = jedit.methods.Ascent(steps=1)
        edit, info = jedit.methods.kfade(
            apply, params, parts, forget, [retain], budget=BUDGET, ascent=ascent
        )
    with phases("evaluate"):
        edited = jedit.apply_edit(params, edit)
        num_edited = sum(x.size for x in jax.tree.leaves(edit.blocks))
        del edit
        before, after = (nll(apply, p, forget) for p in (params, edited))
        kl = output_kl(apply, params, edited, unseen)
    with phases("save"):
        save_model(edited, out, source=folder)
    weights = nbytes(params)
    flops = flops_of_fit(params, paths, sum(sums))
    fit = phases.found["fit, offloaded"]
    computing = fit["seconds"] - fit["of them compiling"]
    return {
        "phases": phases.found,
        "weights GiB": weights / 2**30,
        "edited parameters": num_edited,
        "groups": len(groups),
        "largest group's sums GiB": max(sums) / 2**30,
        "factors GiB": factors / 2**30,
        "bound GiB": (weights + max(sums)) / 2**30 + 3,
        "peak GiB": max(phase["peak GiB"] for phase in phases.found.values()),
        "matmul GFLOP/s": {name: rate / 1e9 for name, rate in rates.items()},
        "fit GFLOP": flops / 1e9,
        "share of the matmul rate, fit": {
            name: flops / computing / rate for name, rate in rates.items()
        },
        "forget nll": [before, after],
        "step": {field: float(values[0]) for field, values in info._asdict().items()},
        "unseen KL": kl,
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--group-mib", type=int, default=128)
    options.add_argument("--only", choices=("whole", "layer"), help="one of the two")
    options.add_argument("--one", choices=("whole", "layer"), help=argparse.SUPPRESS)
    given = options.parse_args()
    folder = given.out / "loading" / "qwen2.5-0.5b"
    make(folder)
    if given.one:
        select, max_dim = MATRICES, 1024
        if given.one == "layer":
            select, max_dim = MATRICES.replace(r"\d+", "12"), 16384
        edited = given.out / "half_billion" / given.one
        found = child(folder, edited, given.group_mib * 2**20, max_dim, select)
        print(json.dumps(found))
        return
    found = {}
    for name in (given.only,) if given.only else ("whole", "layer"):
        command = [sys.executable, "-m", "tests.bench.claims.half_billion", "--one", name]
        command += ["--out", str(given.out), "--group-mib", str(given.group_mib)]
        env = {**os.environ, **ENVIRONMENT}
        run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(run.stdout.splitlines()[-1])
        print(json.dumps(found[name], indent=1))
    write("half_billion", given.out, found)


if __name__ == "__main__":
    main()
