"""Language models from Hugging Face folders, and back into them.

A folder's files are seen as arrays that lie in them, and those as arrays of the parameters' shapes:
permuting, splitting and stacking makes views of views. Parameters are read from these views and
written into them, so that saving needs no way back of its own, and each process touches the parts
alone that its devices hold.

Supported are the families of `jedit.models.families`, in folders of safetensors files (one, or
several with an index): Llama 2 and 3, Mistral and Zephyr, Qwen 2, Qwen 3 and its mixtures of
experts, Gemma 1, 2 and 3, Phi 1, 1.5, 2 and 3, GPT-2, GPT-NeoX (Pythia) and OLMo 2. Not supported:
images, quantised weights, and settings that a model does not compute, which are refused by name.
"""

import bisect
import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, PackedTokens
from jedit.core.devices import no_mesh, on_auto_axes
from jedit.core.paths import parameter_paths
from jedit.core.precision import wide_dtype
from jedit.models._optional import optional
from jedit.models.decoding import Stepper
from jedit.models.functional import to_pure, to_pure_method
from jedit.models.shardings import Shardings, default_shardings
from jedit.models.weight_files import (
    FLOATS,
    INDEX,
    Stack,
    copy_layout,
    flush,
    read_json,
    read_places,
    views,
    weight_files,
)

if TYPE_CHECKING:
    from jedit.models.families import Architecture

# Other forms of the same weights, which would be the unedited ones beside the edited.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def load_model(
    folder: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    shardings: Shardings | None = None,
    remat: bool = False,
) -> tuple[Apply, dict[str, Any], Any]:
    """Load a causal language model as a pure function.

    The causal mask and the positions, counted from the left, are made inside: a token sees itself
    and what stands left of it, so right padding changes nothing before it. `PackedTokens` bring
    their own positions, and a token sees its own row alone. Paths are tunix's:
    "embedder/input_embedding" (vocab, d), "layers/0/attn/q_proj/w" (d, heads, head_dim),
    "layers/0/attn/o_proj/w" (heads, head_dim, d), "layers/0/mlp/{gate,up,down}_proj/kernel"
    (d_in, d_out), "lm_head/w" (d, vocab) unless the embedding is tied, and the norms; Gemma has
    "q_einsum/w" and "kv_einsum/w", or "qkv_einsum/w", and families that tunix lacks have "kernel"
    for "w" and biases. Norms and softmax are computed in float32 in Llama and Qwen.

    Only the parts of the files are read that this process's devices hold, one part at a time: no
    tensor lies whole on one device, unless its sharding says so, or twice on the host.

    Args:
        folder: a folder with config.json and safetensors files: those that
            model.safetensors.index.json names, or all where there is no index.
        dtype: dtype of the parameters and the computation; None: the files', float32 if those
            differ.
        mesh: devices over which `default_shardings` splits the parameters; None: all parameters
            on the default device.
        shardings: a function of a parameter's path and shape that says where it lies, in place of
            the mesh's.
        remat: the backward pass computes each layer anew from what entered it, so that gradients
            keep one array a layer: for a third more arithmetic. On a CPU XLA undoes this, unless
            XLA_FLAGS has --xla_disable_hlo_passes=cse_barrier_expander.

    Returns:
        `(apply, params, config)`: `apply(params, tokens (batch, seq)) -> logits
        (batch, seq, vocab)`, in float32 or wider, of tokens or `PackedTokens`; params as nested
        dicts of arrays; the configuration, of `transformers.AutoConfig`.

    Raises:
        ValueError: an architecture, or a setting of it, that no model here computes; tensors that
            are missing, stand twice, or are of another shape or kind of number; a file that is not
            whole; no such folder; or a mesh and shardings both.
    """
    if mesh is not None and shardings is not None:
        raise ValueError("give a mesh, over which parameters are split by default, or shardings.")
    folder = Path(folder)
    config, places = read_config(folder), read_places(folder)
    kind, module, found = _seen(config, views(places), folder, dtype)
    if remat:
        from jedit.models.families.architecture import with_remat

        kind = with_remat(kind)
        module = abstract_module(kind)
    wanted = _common(found) if dtype is None else jnp.dtype(dtype)
    if mesh is not None:
        shardings = default_shardings(module, mesh)
    apply, shapes = pure_model(kind, module)

    def read(path: str, shape: tuple[int, ...]) -> Array:
        place = None if shardings is None else shardings(path, shape)
        return _read(found[path.replace("/", ".")], shape, wanted, place)

    leaves = [read(path, leaf.shape) for path, leaf in parameter_paths(shapes)]
    params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return apply, params, config


def load_stepper(folder: str | Path, *, dtype: DTypeLike | None = None) -> Stepper:
    """Make a folder's model one position at a time, for `cached_decode`; no weights are read.

    The keys and values are kept as tunix's attention keeps them. All rows stand at one position, so
    prompts are right padded, as `cached_decode` wants them.

    Args:
        folder: the folder that `load_model` is given.
        dtype: the dtype that `load_model` is given.

    Returns:
        The stepper, for the params of `load_model`; compiled programs are kept by this object, so
        one is made for many calls.

    Raises:
        ValueError: what `load_model` refuses in the configuration, or no such folder.
    """
    folder = Path(folder)
    kind, module, _ = _seen(read_config(folder), views(read_places(folder)), folder, dtype)
    call = to_pure_method(module, "__call__")
    sizes = kind.config

    def init(params: PyTree, batch: int, num_positions: int) -> dict[str, dict[str, Array]]:
        # By hand, as tunix's Llama, Qwen 2 and Gemma 3 have no `init_cache`; the form is one.
        inner = getattr(sizes, "dtype", params["embedder"]["input_embedding"].dtype)
        shape = (batch, num_positions, sizes.num_kv_heads, sizes.head_dim)
        layer = {
            "k": jnp.zeros(shape, inner),
            "v": jnp.zeros(shape, inner),
            "end_index": jnp.zeros((batch,), int),  # tunix sets Python's zeros beside it
        }
        return {f"layer_{i}": layer for i in range(sizes.num_layers)}

    def step(
        params: PyTree, tokens: Array, position: Array, cache: dict[str, dict[str, Array]]
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        places = jnp.arange(cache["layer_0"]["k"].shape[1], dtype=position.dtype)
        is_seen = places <= position
        if kind.window is not None:
            is_seen &= places > position - kind.window
        mask = jnp.broadcast_to(is_seen, (len(tokens), 1, len(places)))
        positions = jnp.broadcast_to(position, (len(tokens), 1)).astype(jnp.int32)
        with _usual_rules():
            logits, cache = call(params, tokens[:, None], positions, cache, mask)
        return logits[:, 0].astype(wide_dtype(logits.dtype)), cache

    return Stepper(init, step)


def save_model(params: PyTree, folder: str | Path, *, source: str | Path) -> Path:
    """Write edited parameters as a folder that `load_model` and `transformers` read.

    Each process writes the parts that its devices hold, into files that all of them see: on one
    host, or on a file system that keeps their pages alike. What was in files of the same names is
    replaced; the configuration is written last, so that a folder that was broken off is no model.
    Files and names of the tensors, config and tokenizer are the source's; tensors that are no
    parameter (of an image tower, say) are copied. Weights are written in the params' dtype, and
    config.json says so.

    Args:
        params: the edited parameters of `load_model(source)`.
        folder: the new folder.
        source: the folder that the model was loaded from.

    Returns:
        The new folder.

    Raises:
        ValueError: the params are not the source's, the two folders are one, or the new one holds
            other weights already, which would be loaded with these.
    """
    folder, source = Path(folder), Path(source)
    if folder.resolve() == source.resolve():
        raise ValueError(f"{folder} is the source: an edited model goes into a folder of its own.")
    files = weight_files(source)
    names = {file.name for file in files}
    if others := sorted({file.name for file in folder.glob("*.safetensors")} - names):
        raise ValueError(f"{folder} holds other weights already: {', '.join(others)}.")
    values = {path.replace("/", "."): leaf for path, leaf in parameter_paths(params)}
    dtypes = sorted({jnp.dtype(leaf.dtype) for leaf in values.values()}, key=str)
    if len(dtypes) != 1:
        raise ValueError(f"a folder has weights of one dtype, but the params have {dtypes}.")
    dtype = dtypes[0]
    kind = family_of(read_config(source), dtype)
    module, old = abstract_module(kind), views(read_places(source))
    _check_params(module, values)
    kept = _untouched(old, _converted(kind, module, old, source))
    doubles = {}
    if kind.is_tied and "lm_head.weight" in kept:  # some folders have it twice
        doubles["lm_head.weight"] = values["embedder.input_embedding"]
    is_first = jax.process_index() == 0
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", INDEX):
            (folder / name).unlink(missing_ok=True)
        for file in files:
            copy_layout(file, folder / file.name, set(old) - (kept - set(doubles)), dtype)
    _all_wait("laid out")
    new = views(read_places(folder), "r+")
    for path, view in _converted(kind, module, new, folder).items():
        _write(values[path], view)
    for name, value in doubles.items():
        _write(value, new[name])
    if is_first:
        for name in kept - set(doubles):
            new[name][...] = old[name]
    num_bytes = sum(value.nbytes for value in new.values())
    flush(new)
    _all_wait("written")
    if is_first:
        # Last, so that a folder that was broken off is no model.
        _copy_the_rest(source, folder, dtype, num_bytes)
    _all_wait("whole")
    return folder


def _copy_the_rest(source: Path, folder: Path, dtype: jnp.dtype, num_bytes: int) -> None:
    """Copy what lies beside the weights, true to the new ones."""
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS and file.name not in {INDEX}:
            shutil.copyfile(file, folder / file.name)
    config = _with_dtype(read_json(source / "config.json"), dtype.name)
    _write_json(folder / "config.json", config)
    if (source / INDEX).exists():
        index = read_json(source / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": num_bytes}
        _write_json(folder / INDEX, index)


def read_config(folder: str | Path) -> Any:
    """Read a folder's config.json through `transformers`, which knows every family's defaults.

    Raises:
        ValueError: the folder has no config.json, or one of a family that `transformers` does not
            know.
    """
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise ValueError(
            f"{folder}: there is no such folder. Models are read from a folder on this machine; of "
            f"a name on the hub `hf download {folder} --local-dir DIR` makes one."
        )
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is no Hugging Face folder.")
    auto = optional("transformers").AutoConfig
    return auto.from_pretrained(str(folder), trust_remote_code=False)


def _causal(
    window: int | None, num_positions: int, module: Any, inputs: Array | PackedTokens
) -> Array:
    is_packed = isinstance(inputs, PackedTokens)
    tokens = inputs.tokens if is_packed else inputs
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (batch, seq), got {tokens.shape}.")
    batch, seq = tokens.shape
    if num_positions and seq > num_positions and not is_packed:
        raise ValueError(f"{seq} tokens are more than the model's {num_positions} positions.")
    positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32)[None], (batch, seq))
    mask = jnp.broadcast_to(jnp.tri(seq, dtype=bool)[None], (batch, seq, seq))
    if is_packed:
        positions = inputs.positions
        mask &= inputs.segments[:, :, None] == inputs.segments[:, None, :]
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None, :] < window
    logits, _ = module(tokens, positions, None, mask)
    return logits.astype(wide_dtype(logits.dtype))


def pure_model(kind: "Architecture", module: Any) -> tuple[Apply, dict[str, Any]]:
    """Return a family's module as a function of tokens, and the shapes of its parameters."""
    most = getattr(kind.config, "num_positions", 0)
    apply, shapes = to_pure(module, functools.partial(_causal, kind.window, most))
    return _by_the_usual_rules(apply), shapes


def _by_the_usual_rules(apply: Apply) -> Apply:
    """Run a model by JAX's default rules of promotion, whatever stricter ones the user has set."""

    @on_auto_axes  # no model names the axes of what it computes
    def run(params: PyTree, inputs: Any) -> Array:
        with _usual_rules():
            if isinstance(inputs, PackedTokens):
                return apply(params, jax.tree.map(jnp.asarray, inputs))
            return apply(params, jnp.asarray(inputs))

    return run


@contextlib.contextmanager
def _usual_rules() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def _seen(
    config: Any, tensors: Mapping[str, np.ndarray], folder: Path, dtype: DTypeLike | None
) -> tuple["Architecture", Any, dict[str, np.ndarray | Stack]]:
    """Return the family, its module of shapes, and views of its parameters.

    Without a dtype it is the parameters' own: what else lies in the files does not count.
    """
    kind = family_of(config, jnp.float32 if dtype is None else dtype)
    found = _converted(kind, abstract_module(kind), tensors, folder)
    if dtype is None:
        kind = family_of(config, _common(found))
    return kind, abstract_module(kind), found


def stored_dtype(folder: Path) -> jnp.dtype:
    """Return the dtype of a folder's parameters, which `load_model` takes where it is given none.

    Raises:
        ValueError: what `load_model` refuses in a folder.
    """
    return _common(_seen(read_config(folder), views(read_places(folder)), folder, None)[2])


def _common(found: Mapping[str, np.ndarray | Stack]) -> jnp.dtype:
    """Return the dtype of the parameters' tensors, float32 if they differ."""
    stored = {view.dtype for view in found.values()}
    return jnp.dtype(stored.pop() if len(stored) == 1 else jnp.float32)


def family_of(config: Any, dtype: DTypeLike) -> "Architecture":
    """Return the model of a configuration, as `jedit.models.families.architecture` finds it."""
    from jedit.models.families import architecture  # late: Flax takes a third of a second

    return architecture(config, dtype)


def abstract_module(kind: "Architecture") -> Any:
    """Return the module with shapes in place of arrays."""
    nnx = optional("flax.nnx")
    with no_mesh():  # whose axes would have to be those that the modules name
        module = nnx.eval_shape(lambda: kind.model_class(kind.config, rngs=nnx.Rngs(params=0)))
    kind.finish(module)
    return module


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's parameters by their paths, with dots."""
    _, shapes = to_pure(module)
    return {path.replace("/", "."): leaf.shape for path, leaf in parameter_paths(shapes)}


def _converted(
    kind: "Architecture", module: Any, tensors: Mapping[str, np.ndarray], folder: Path
) -> dict[str, np.ndarray | Stack]:
    """Return views of a folder's tensors, each shaped as a parameter.

    Raises:
        ValueError: a parameter has no tensor, or one of another shape.
    """
    wanted = _shapes(module)
    try:
        found = kind.convert(tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: a tensor has not the shape of config.json: {error}") from error
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(
            f"{folder} has no tensors for {', '.join(missing[:6])}{', ...' * (len(missing) > 6)}; "
            f"it has {', '.join(sorted(tensors)[:6])}, ..."
        )
    for path, shape in wanted.items():
        if found[path].shape != shape:
            raise ValueError(
                f"{folder}: {path} has shape {found[path].shape}, by config.json {shape}."
            )
        if found[path].dtype not in FLOATS.values():
            raise ValueError(
                f"{folder}: {path} is stored as {found[path].dtype}, which is not supported; only "
                f"{', '.join(FLOATS)} are."
            )
    return {path: found[path] for path in wanted}


def _read(
    view: np.ndarray | Stack, shape: tuple[int, ...], dtype: jnp.dtype, place: Sharding | None
) -> Array:
    """Read a parameter, each device its part."""

    def part(index: Any) -> np.ndarray:
        if isinstance(view, Stack):
            return np.asarray(view[index], dtype, order="C")
        # A copy: the array that JAX makes of it may be this memory, and the file may change.
        return np.array(view[index], dtype, order="C")

    if place is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, place, part)


def _check_params(module: Any, values: Mapping[str, Any]) -> None:
    """Check that these are the parameters of the source.

    Raises:
        ValueError: they are not.
    """
    wanted = _shapes(module)
    if differing := sorted(set(values) ^ set(wanted)):
        raise ValueError(f"the params are not those of the source; in one only: {differing[:6]}")
    for path, shape in wanted.items():
        if values[path].shape != shape:
            raise ValueError(
                f"{path} has shape {values[path].shape}, in the source's model {shape}."
            )


def _write(value: Any, view: np.ndarray | Stack) -> None:
    """Write a parameter into its file: what this process holds, each part once."""
    if not isinstance(value, jax.Array):
        view[(slice(None),) * value.ndim] = np.asarray(value)
        return
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            view[shard.index] = np.asarray(shard.data)


def _untouched(
    tensors: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray | Stack]
) -> set[str]:
    """Return the tensors that no parameter lies in, such as those of an image tower.

    Raises:
        RuntimeError: a parameter is no view, so that writing to it would be lost.
    """
    bounds = np.lib.array_utils.byte_bounds
    places = sorted((*bounds(value), name) for name, value in tensors.items() if value.size)
    begins = [begin for begin, _, _ in places]
    touched = set()
    for path, view in found.items():
        for part in view.parts if isinstance(view, Stack) else (view,):
            low, high = bounds(part)
            _, end, name = places[max(bisect.bisect_right(begins, low) - 1, 0)]
            if not begins[0] <= low < high <= end:
                raise RuntimeError(f"{path} is a copy of its tensor, which cannot be written to.")
            touched.add(name)
    return set(tensors) - touched


def _all_wait(where: str) -> None:
    """Wait until every process has come to this point."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jedit.save_model: {where}")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the configuration with another dtype, under the name that it has for it already.

    Before transformers 5 that name was `torch_dtype`.
    """
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, name: dtype}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
