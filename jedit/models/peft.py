"""Adapter folders of PEFT: loaded beside a model, edited alone, and saved for PEFT to load.

PEFT's LoRA stands beside a module of PyTorch's, jedit's beside a parameter, and a module is not
always one parameter: Phi-3's queries, keys and values are one, Gemma's keys and values are two in
one parameter. Which coordinate of a module is which of a parameter is read from the family's own
conversion. A parameter of several modules gets their adapters side by side, A = (A1 A2), B block by
block; a module of several parameters is saved with theirs, as `rank_pattern` says.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply
from jedit.core.devices import sharding_of
from jedit.core.paths import parameter_paths
from jedit.models._optional import optional
from jedit.models.huggingface import family_of, read_config
from jedit.models.lora import Adapted, adapter_weights, with_lora
from jedit.models.weight_files import Stack, read_json, read_places
from jedit.tracing.sites import Weight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings under which an adapter is more than two matrices, and the values that mean it is not.
PLAIN = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # Some begin by changing the base's weights, some act behind certain tokens alone.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


class Module(NamedTuple):
    """A module's adapter, by its name in PEFT: its outputs change by `scale * B A x`."""

    key: str
    a: np.ndarray  # (rank, in)
    b: np.ndarray  # (out, rank)
    scale: float


class Coordinates(NamedTuple):
    """Which coordinate of which module each of a parameter's matrix is.

    Attributes:
        module: (d_out,), number of the tensor in the order of the base's names.
        outputs: (d_out,), row of the module's matrix.
        inputs: (d_in,), its column.
    """

    module: np.ndarray
    outputs: np.ndarray
    inputs: np.ndarray


def load_adapter(
    folder: str | Path, apply: Apply, params: PyTree, *, source: str | Path
) -> Adapted:
    """Put a folder's LoRA adapters beside the model that it was trained on.

    Select the adapters alone by "^lora/", as in `with_lora`.

    Args:
        folder: PEFT's folder, with adapter_config.json and adapter_model.safetensors.
        apply: the function of `load_model(source)`.
        params: its parameters, edited or not.
        source: the folder that they were loaded from.

    Returns:
        The adapted function and its parameters, adapters in the file's dtype; on a mesh they lie
        whole on every device.

    Raises:
        ValueError: adapters of another kind than plain LoRA, of modules that the model has not, of
            a part of a parameter (in Gemma of its keys without its values, say), or of parameters
            that stand in no product of matrices, such as an embedding.
    """
    folder = Path(folder)
    config, modules = _read(folder, Path(source))
    names = list(modules)
    leaves = dict(parameter_paths(params))
    found, weights = _coordinates(apply, params, source, names, config)
    scale = modules[names[0]].scale
    adapted = with_lora(
        apply,
        params,
        np.zeros((1, 2), np.int32),
        rank=1,
        key=jax.random.key(0),  # what is drawn by it is replaced
        select=_any_of(found),
        scale=scale,
    )
    lora: dict[str, Any] = {}
    for path, places in found.items():
        a, b = [], []
        for i, name in enumerate(names):
            mine = places.module == i
            if not mine.any():
                continue
            module = modules[name]
            a.append(module.a.T[places.inputs])
            block = np.zeros((len(module.a), weights[path].d_out), module.b.dtype)
            ratio = np.asarray(module.scale / scale, module.b.dtype)
            block[:, mine] = module.b.T[:, places.outputs[mine]] * ratio
            b.append(block)
        node = lora
        for part in path.split("/"):
            node = node.setdefault(part, {})
        for name, parts, axis in (("a", a, 1), ("b", b, 0)):
            node[name] = _beside(np.concatenate(parts, axis=axis), leaves[path])
    return adapted._replace(params={"base": params, "lora": lora})


def save_adapter(
    params: PyTree,
    folder: str | Path,
    *,
    apply: Apply,
    adapter: str | Path,
    source: str | Path,
) -> Path:
    """Write edited adapters as a folder that PEFT and `load_adapter` read.

    Args:
        params: the parameters of `load_adapter(...)`, edited; the base's are not written.
        folder: the new folder.
        apply: the function of `load_model(source)`.
        adapter: the folder that the adapters were loaded from.
        source: the folder of the model.

    Returns:
        The new folder.

    Raises:
        ValueError: the two folders are one, or the adapters are not those of `adapter`.
    """
    folder, adapter = Path(folder), Path(adapter)
    if folder.resolve() == adapter.resolve():
        raise ValueError(f"{folder} is the source: edited adapters go into a folder of their own.")
    config, modules = _read(adapter, Path(source))
    names = list(modules)
    found, _ = _coordinates(apply, params["base"], source, names, config)
    lora = dict(parameter_paths(params["lora"]))
    if {f"{path}/{side}" for path in found for side in "ab"} != set(lora):
        raise ValueError(f"the params have other adapters than {adapter}: {sorted(lora)[:6]}, ...")
    scale = modules[names[0]].scale
    tensors, ranks, alphas = {}, {}, {}
    for i, module in enumerate(modules.values()):
        sides = []
        for path, places in found.items():
            mine = places.module == i
            if not mine.any():
                continue
            a, b = (np.asarray(lora[f"{path}/{side}"]) for side in "ab")
            rows = np.zeros((a.shape[1], module.a.shape[1]), a.dtype)
            rows[:, places.inputs] = a.T
            columns = np.zeros((len(module.b), len(b)), b.dtype)
            columns[places.outputs[mine]] = b[:, mine].T
            sides.append((rows, columns))
        a, b = _joined(sides, len(module.a))
        b = b * np.asarray(scale / module.scale, b.dtype)
        key = module.key
        tensors[f"{PREFIX}{key}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{PREFIX}{key}.lora_B.weight"] = np.ascontiguousarray(b)
        if len(a) != config["r"] or module.scale != _scale(config, config["r"], None):
            ranks[key] = len(a)
            alphas[key] = module.scale * _divisor(config, len(a))
    if jax.process_index():
        return folder  # the adapters lie whole in every process, and one writes them
    folder.mkdir(parents=True, exist_ok=True)
    optional("safetensors.numpy").save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps({**config, "rank_pattern": ranks, "alpha_pattern": alphas}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def _read(folder: Path, source: Path) -> tuple[dict[str, Any], dict[str, Module]]:
    """Return an adapter's configuration, and its modules by the names of the base's tensors.

    Raises:
        ValueError: what `load_adapter` refuses.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: it is no adapter of PEFT.")
    config = read_json(folder / CONFIG)
    for name, values in PLAIN.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(
                f"{folder}: an adapter with {name} = {config[name]!r} is not supported."
            )
    bases = read_places(source)
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name, value in optional("safetensors.numpy").load_file(folder / WEIGHTS).items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.*)\.lora_([AB])\.weight", name)
        if match is None:
            raise ValueError(f"{folder}: {name} is no matrix of plain LoRA.")
        sides.setdefault(match[1], {})[match[2]] = value
    modules = {}
    for key, pair in sides.items():
        # Some folders on the hub leave the model's own name out.
        options = (f"{key}.weight", f"{key.partition('.')[2]}.weight")
        tensor = next((name for name in options if name in bases), None)
        if tensor is None or set(pair) != {"A", "B"}:
            raise ValueError(f"{folder}: {key} is no module of {source}, or half an adapter.")
        modules[tensor] = Module(key, pair["A"], pair["B"], _scale(config, len(pair["A"]), key))
        out, into = _sides(bases[tensor].shape, config)
        if (len(pair["B"]), pair["A"].shape[1]) != (out, into):
            raise ValueError(f"{folder}: the adapter of {key} is not of its shape, {out}, {into}.")
    return config, modules


def _sides(shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many outputs and inputs a module's matrix of this shape has."""
    out, into = shape
    return (into, out) if config.get("fan_in_fan_out") else (out, into)


def _divisor(config: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else float(rank)


def _scale(config: Mapping[str, Any], rank: int, key: str | None) -> float:
    """Return the factor of a module's adapter; without a key, that of most."""
    alpha = config["lora_alpha"]
    if key is not None:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", key):
                alpha = value
                break
    return alpha / _divisor(config, rank)


def _any_of(paths: Mapping[str, Any]) -> str:
    return "^(" + "|".join(re.escape(path) for path in paths) + ")$"


def _coordinates(
    apply: Apply,
    params: PyTree,
    source: str | Path,
    names: list[str],
    config: Mapping[str, Any],
) -> tuple[dict[str, Coordinates], dict[str, Weight]]:
    """Find the parameters that adapters stand beside, and which coordinate there is which.

    Raises:
        ValueError: a parameter that can have no adapter, or has one of a part of it.
    """
    kind = family_of(read_config(source), np.float32)
    shapes = {name: place.shape for name, place in read_places(Path(source)).items()}
    axis_out = 1 if config.get("fan_in_fan_out") else 0

    def converted(number: Any) -> dict[str, Any]:
        """Convert tensors in place of which stand numbers, repeated without being stored."""
        tensors = {}
        for name, shape in shapes.items():
            tensors[name] = np.broadcast_to(number(name, shape), shape)
        return kind.convert(tensors)

    def along(axis: int) -> Any:
        def number(_: str, shape: tuple[int, ...]) -> np.ndarray:
            if len(shape) != 2:
                return np.zeros((), np.int32)
            numbers = np.arange(shape[axis], dtype=np.int32)
            return numbers[:, None] if axis == 0 else numbers

        return number

    order = {name: i for i, name in enumerate(names)}
    module = converted(lambda name, _: np.asarray(order.get(name, -1), np.int32))
    outputs, inputs = converted(along(axis_out)), converted(along(1 - axis_out))
    touched = []
    for path, value in module.items():
        # A part is of one tensor, so that one number of it tells which.
        parts = value.parts if isinstance(value, Stack) else (value,)
        has_adapter = [int(part[(0,) * part.ndim]) >= 0 for part in parts]
        if any(has_adapter) and not all(has_adapter):
            raise ValueError(
                f"{path} is one parameter of {len(parts)} modules, of which the adapter has only "
                f"{sum(has_adapter)}; one of all or of none of them can be loaded."
            )
        if any(has_adapter):
            touched.append(path)
    paths = [path.replace(".", "/") for path in touched]
    weights = adapter_weights(
        apply, params, np.zeros((1, 2), np.int32), _any_of(dict.fromkeys(paths))
    )
    found = {}
    for dotted, path in zip(touched, paths, strict=True):
        weight = weights[path]
        tables = [_matrix(weight, value[dotted]) for value in (module, outputs, inputs)]
        places = Coordinates(tables[0][0], tables[1][0], tables[2][:, 0])
        along_columns = (table == table[:1] for table in tables[:2])
        if not (
            all(x.all() for x in along_columns) and (tables[2] == places.inputs[:, None]).all()
        ):
            raise ValueError(f"{path} reads the modules of its adapters in no order of its own.")
        found[path] = places
    return found, weights


def _whole(value: Any) -> np.ndarray:
    return value[(slice(None),) * len(value.shape)] if isinstance(value, Stack) else value


def _matrix(weight: Weight, value: Any) -> np.ndarray:
    """Return numbers that are laid out as a parameter as they lie in its matrix."""
    whole = np.ascontiguousarray(_whole(value)).reshape(weight.shape)
    return np.asarray(weight.gather({weight.path: jnp.asarray(whole)})[0])


def _beside(value: np.ndarray, leaf: Any) -> Array:
    """Put an adapter on the devices of its weight."""
    sharding = sharding_of(leaf)
    if sharding is None:
        return jnp.asarray(value)
    return jax.device_put(value, NamedSharding(sharding.mesh, PartitionSpec()))


def _joined(sides: list[tuple[np.ndarray, np.ndarray]], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the A and B of a module from those of its parts."""
    first = sides[0][0]
    if all(np.array_equal(first, a) for a, _ in sides):
        a, b = first, np.sum([b for _, b in sides], axis=0)
    else:
        a, b = (np.concatenate(parts, axis=i) for i, parts in enumerate(zip(*sides, strict=True)))
    if len(a) > rank and (is_used := b.any(axis=0)).sum() >= rank:
        a, b = a[is_used], b[:, is_used]  # another module's, which this one does not read
    return a, b
