"""Claim: a folder is read over a mesh at the speed of tunix's loader, in no more memory.

    python -m tests.bench.claims.loading [--rounds 2]      (in .venv-llm)

A folder of Qwen2.5-0.5B's shape with random numbers in bfloat16 (0.99 GB) is written under `out`,
and read over eight forced CPU devices, 4 by 2, each time in a process of its own: by
`jedit.models.load_model`, by tunix's loader, and by orbax's safetensors layout, which reads the
tensors as PyTorch has them and leaves their transposing to a program on the devices.  Seconds are
those of reading alone, memory is what the process holds beside files at most.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.claims.evidence import OUT, write

LOADERS = ("jedit", "tunix", "orbax")
SIZES = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
FLAGS = "--xla_force_host_platform_device_count=8"


def make(folder: Path) -> None:
    """Write the folder, if it is not there."""
    import ml_dtypes
    import numpy as np
    import transformers
    from safetensors.numpy import save_file

    from tests.llm.random_folder import shapes

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config, rng = transformers.Qwen2Config(**SIZES), np.random.default_rng(0)
    tensors = {
        name: (("norm" in name) + 0.02 * rng.standard_normal(shape, np.float32)).astype(
            ml_dtypes.bfloat16
        )
        for name, shape in shapes(config).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": "bfloat16"}))


def by_jedit(folder: Path) -> Any:
    import jax

    from jedit.models import load_model

    return load_model(folder, mesh=jax.make_mesh((4, 2), ("data", "model")))[1]


def by_tunix(folder: Path) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models import safetensors_loader
    from tunix.models.qwen2 import model, params

    from jedit.models.huggingface import family_of, read_config

    module = safetensors_loader.load_and_create_model(
        str(folder),
        model.Qwen2,
        family_of(read_config(folder), jnp.bfloat16).config,
        params._get_key_and_transform_mapping,
        mesh=jax.make_mesh((4, 2), ("fsdp", "tp")),
        dtype=jnp.bfloat16,
    )
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def by_orbax(folder: Path) -> Any:
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint.experimental.v1 as ocp
    from jax.sharding import NamedSharding, PartitionSpec

    from jedit.models.huggingface import family_of, read_config
    from jedit.models.weight_files import read_places

    mesh = jax.make_mesh((4, 2), ("data", "model"))
    kind = family_of(read_config(folder), jnp.bfloat16)

    def split(name: str, shape: tuple[int, ...]) -> NamedSharding:
        # The rows of a layer's matrix are its outputs.
        reads = any(part in name for part in ("o_proj", "down_proj"))
        axes = ("data", "model") if reads else ("model", "data")
        return NamedSharding(mesh, PartitionSpec(*axes if len(shape) > 1 else ()))

    wanted = {
        name: jax.ShapeDtypeStruct(place.shape, place.dtype, sharding=split(name, place.shape))
        for name, place in read_places(folder).items()
    }
    with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
        tensors = ocp.load(str(folder / "model.safetensors"), wanted)
    return jax.jit(kind.convert, donate_argnums=0)(tensors)


def held_gib() -> float:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**20


def measure(load: Callable[[Path], Any], folder: Path) -> dict[str, float]:
    """Seconds and memory of one load, on top of what the process held before."""
    import jax

    jax.block_until_ready(jax.numpy.ones(()))
    before = peak = held_gib()
    is_over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.005):
            peak = max(peak, held_gib())

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.perf_counter()
    params = jax.block_until_ready(load(folder))
    seconds = time.perf_counter() - start
    is_over.set()
    watching.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**30
    return {"seconds": seconds, "peak GiB": peak - before, "parameters GiB": size}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--one", choices=LOADERS, help=argparse.SUPPRESS)
    given = options.parse_args()
    folder = given.out / "loading" / "qwen2.5-0.5b"
    if given.one:
        loader = {"jedit": by_jedit, "tunix": by_tunix, "orbax": by_orbax}[given.one]
        print(json.dumps(measure(loader, folder)))
        return
    make(folder)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    for _ in range(given.rounds):
        for name in LOADERS:
            command = [sys.executable, "-m", "tests.bench.claims.loading", "--one", name]
            run = subprocess.run(
                [*command, "--out", str(given.out)],
                env={**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                check=True,
            )
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
            print(name, found[name][-1])
    write("loading", given.out, {"found": found})


if __name__ == "__main__":
    main()
