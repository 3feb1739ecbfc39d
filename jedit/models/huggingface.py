"""Language models from Hugging Face folders, and back into them.

The models and the loading are tunix's. Saving runs tunix's own conversion backwards: it moves
numbers about and computes none, so its transpose as a linear map is its inverse, whatever it
permutes, reshapes or stacks.

Supported, in folders of safetensors files (one, or several with an index): LlamaForCausalLM with
Llama 3's positions or plain ones, Qwen2ForCausalLM, Qwen3ForCausalLM, GemmaForCausalLM and
Gemma3ForCausalLM. Not supported: mixtures of experts, images, sliding windows but Gemma 3's, biases
but Qwen 2's, quantised weights.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, PackedTokens
from jedit.core.paths import parameter_paths
from jedit.core.precision import wide_dtype
from jedit.models._optional import optional
from jedit.models._tunix import Architecture, architecture
from jedit.models.decoding import Stepper
from jedit.models.functional import to_pure, to_pure_method

INDEX = "model.safetensors.index.json"
# Other forms of the same weights, which would be the unedited ones beside the edited.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
DTYPES = {
    "BF16": jnp.bfloat16,
    "F16": jnp.float16,
    "F32": jnp.float32,
    "F64": jnp.float64,
}


def load_model(
    folder: str | Path, *, dtype: DTypeLike | None = None
) -> tuple[Apply, dict[str, Any], Any]:
    """Load a causal language model as a pure function.

    The causal mask and the positions, counted from the left, are made inside: a token sees itself
    and what stands left of it, so right padding changes nothing before it. `PackedTokens` bring
    their own positions, and a token sees its own row alone. Paths are tunix's:
    "embedder/input_embedding" (vocab, d), "layers/0/attn/q_proj/w" (d, heads, head_dim),
    "layers/0/attn/o_proj/w" (heads, head_dim, d), "layers/0/mlp/{gate,up,down}_proj/kernel"
    (d_in, d_out), "lm_head/w" (d, vocab) unless the embedding is tied, and the norms. Norms and
    softmax are computed in float32 in Llama and Qwen.

    Args:
        folder: a folder with config.json and safetensors files: those that
            model.safetensors.index.json names, or all where there is no index.
        dtype: dtype of the parameters and the computation; None: the files', float32 if those
            differ.

    Returns:
        `(apply, params, config)`: `apply(params, tokens (batch, seq)) -> logits
        (batch, seq, vocab)`, in float32 or wider, of tokens or `PackedTokens`; params as nested
        dicts of arrays; the configuration, of `transformers.AutoConfig`.

    Raises:
        ValueError: an architecture, or a setting of it, that tunix does not compute; tensors that
            are missing, stand twice, or are of another shape or kind of number; a file that is not
            whole; or no such folder.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _tensors(folder)
    stored = {spec.dtype for spec in tensors.values()}
    wanted = _common(tensors) if dtype is None else jnp.dtype(dtype)
    kind = architecture(config, wanted)
    _check_complete(kind, tensors, folder)
    loader = optional("tunix.models.safetensors_loader")
    with _only_weights(folder) as place:
        module = loader.load_and_create_model(
            str(place),
            kind.model_class,
            kind.config,
            kind.key_mapping,
            preprocess_fn=None if kind.preprocess is None else kind.preprocess(),
            dtype=wanted,
            # The fast way takes one dtype for all of a file.
            mode="optimized" if len(stored) == 1 else "original",
        )
    kind.finish(module)
    apply, params = to_pure(module, _causal)
    return _by_the_usual_rules(apply), params, config


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
    wanted = _common(_tensors(folder)) if dtype is None else jnp.dtype(dtype)
    kind = architecture(read_config(folder), wanted)
    nnx = optional("flax.nnx")

    def make() -> Any:
        module = kind.model_class(kind.config, rngs=nnx.Rngs(params=0))
        kind.finish(module)
        return module

    call = to_pure_method(nnx.eval_shape(make), "__call__")
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
        is_past = jnp.broadcast_to(places <= position, (len(tokens), 1, len(places)))
        positions = jnp.broadcast_to(position, (len(tokens), 1)).astype(jnp.int32)
        with _usual_rules():
            logits, cache = call(params, tokens[:, None], positions, cache, is_past)
        return logits[:, 0].astype(wide_dtype(logits.dtype)), cache

    return Stepper(init, step)


def save_model(params: PyTree, folder: str | Path, *, source: str | Path) -> Path:
    """Write edited parameters as a folder that `load_model` and `transformers` read.

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
    names = {file.name for file in _weight_files(source)}
    if others := sorted({file.name for file in folder.glob("*.safetensors")} - names):
        raise ValueError(f"{folder} holds other weights already: {', '.join(others)}.")
    values = _dotted(params)
    dtypes = sorted({jnp.dtype(leaf.dtype) for leaf in values.values()}, key=str)
    if len(dtypes) != 1:
        raise ValueError(f"a folder has weights of one dtype, but the params have {dtypes}.")
    dtype, specs = dtypes[0], _tensors(source)
    kind = architecture(read_config(source), dtype)
    edited = _from_params(kind, values, specs, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    for file in _weight_files(source):
        tensors = {}
        with _opened(file) as opened:
            metadata = opened.metadata() or {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - no mapping
                kept = name not in edited
                # Each tensor goes back into the file it came from, one file in memory at a time:
                # the index stays true.
                value = opened.get_tensor(name) if kept else np.asarray(edited.pop(name))
                tensors[name] = np.ascontiguousarray(value)  # the writer takes memory as it lies
                num_bytes += tensors[name].nbytes
        optional("safetensors.numpy").save_file(tensors, folder / file.name, metadata=metadata)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS and file.name not in {INDEX}:
            shutil.copyfile(file, folder / file.name)
    config = _with_dtype(_read_json(source / "config.json"), dtype.name)
    _write_json(folder / "config.json", config)
    if (source / INDEX).exists():
        index = _read_json(source / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": num_bytes}
        _write_json(folder / INDEX, index)
    return folder


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
    return optional("transformers").AutoConfig.from_pretrained(str(folder))


def _causal(module: Any, inputs: Array | PackedTokens) -> Array:
    is_packed = isinstance(inputs, PackedTokens)
    tokens = inputs.tokens if is_packed else inputs
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (batch, seq), got {tokens.shape}.")
    batch, seq = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32)[None], (batch, seq))
    mask = jnp.broadcast_to(jnp.tri(seq, dtype=bool)[None], (batch, seq, seq))
    if is_packed:
        positions = inputs.positions
        mask &= inputs.segments[:, :, None] == inputs.segments[:, None, :]
    logits, _ = module(tokens, positions, None, mask)
    return logits.astype(wide_dtype(logits.dtype))


def _by_the_usual_rules(apply: Apply) -> Apply:
    """Run a model by JAX's default rules of promotion, whatever stricter ones the user has set."""

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


def _common(tensors: Mapping[str, jax.ShapeDtypeStruct]) -> jnp.dtype:
    """Return the dtype of a folder's tensors, float32 if they differ."""
    stored = {spec.dtype for spec in tensors.values()}
    return jnp.dtype(stored.pop() if len(stored) == 1 else jnp.float32)


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights: those of the index, else all there are.

    Raises:
        ValueError: the folder has no safetensors file, or the index names one that is not there.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors file.")
    index = folder / INDEX
    if not index.exists():
        return files
    try:
        names = sorted(set(_read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of weights: {error!r}") from None
    if missing := [name for name in names if folder / str(name) not in files]:
        raise ValueError(f"{index}: names {missing[:6]}, which are no safetensors files beside it.")
    return [folder / name for name in names]


@contextlib.contextmanager
def _only_weights(folder: Path) -> Iterator[Path]:
    """Make a folder of the weights' files alone, since tunix reads whatever lies beside them.

    Yields:
        The folder.
    """
    files = _weight_files(folder)
    if len(files) == len(list(folder.glob("*.safetensors"))):
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for file in files:
            (Path(made) / file.name).symlink_to(file.absolute())
        yield Path(made)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Yields:
        The open file.

    Raises:
        ValueError: the file is no safetensors file, or only a part of one.
    """
    safetensors = optional("safetensors")
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file}: is no whole safetensors file ({error}); copy or download it anew."
        ) from None


def _tensors(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return names, shapes and dtypes of a folder's tensors, without reading them.

    Raises:
        ValueError: the folder has no tensors, has one twice, or has some that are no ordinary
            floats.
    """
    found, places = {}, {}
    for file in _weight_files(folder):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in found:
                    raise ValueError(
                        f"{folder}: {name} stands in {places[name]} and in {file.name}; take one "
                        f"of the files away, or name the right ones in {INDEX}."
                    )
                places[name] = file.name
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{file}: {name} is stored as {part.get_dtype()}, which is not supported; "
                        f"only {', '.join(DTYPES)} are."
                    )
                dtype = DTYPES[part.get_dtype()]
                found[name] = jax.ShapeDtypeStruct(tuple(part.get_shape()), dtype)
    return found


def _dotted(params: PyTree) -> dict[str, Any]:
    return {path.replace("/", "."): leaf for path, leaf in parameter_paths(params)}


def _expected(kind: Architecture) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the parameters of the model, as tunix's table names them."""
    nnx = optional("flax.nnx")
    module = nnx.eval_shape(lambda: kind.model_class(kind.config, rngs=nnx.Rngs(params=0)))
    return _dotted(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def _converted(kind: Architecture, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a folder's tensors into what tunix's loader makes of them, by tunix's names."""
    find = optional("tunix.utils.torch_utils").torch_key_to_jax_key
    table, found = kind.key_mapping(kind.config), {}
    for name, value in tensors.items():
        try:
            path, transform = find(table, name)
        except ValueError:  # in no row: the loader skips it too
            continue
        axes, shape = transform or (None, None)
        value = value.transpose(axes) if axes else value
        found[path] = value.reshape(shape) if shape else value
    return found if kind.preprocess is None else kind.preprocess()(found)


def _check_complete(
    kind: Architecture, tensors: Mapping[str, jax.ShapeDtypeStruct], folder: Path
) -> None:
    wanted = _expected(kind)
    try:
        # By shapes alone, so that what is missing is told by name before gigabytes are read.
        found = jax.eval_shape(lambda t: _converted(kind, t), dict(tensors))
    except TypeError as error:
        raise ValueError(f"{folder}: a tensor has not the shape of config.json: {error}") from error
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(
            f"{folder} has no tensors for {', '.join(missing[:6])}{', ...' * (len(missing) > 6)}; "
            f"it has {', '.join(sorted(tensors)[:6])}, ..."
        )
    for path, spec in wanted.items():
        if found[path].shape != spec.shape:
            raise ValueError(
                f"{folder}: {path} has shape {found[path].shape}, by config.json {spec.shape}."
            )


def _from_params(
    kind: Architecture,
    values: Mapping[str, Array],
    specs: Mapping[str, jax.ShapeDtypeStruct],
    dtype: jnp.dtype,
) -> dict[str, Array]:
    """Convert the parameters back into the folder's tensors.

    Raises:
        ValueError: the parameters are not the model's.
    """
    wanted = _expected(kind)
    if differing := sorted(set(values) ^ set(wanted)):
        raise ValueError(f"the params are not those of the source; in one only: {differing[:6]}")
    for path, spec in wanted.items():
        if values[path].shape != spec.shape:
            raise ValueError(
                f"{path} has shape {values[path].shape}, in the source's model {spec.shape}."
            )

    def convert(tensors: dict[str, Any]) -> dict[str, Any]:
        found = _converted(kind, tensors)
        return {path: found[path] for path in wanted}

    tensors = {name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in specs.items()}
    with _usual_rules():
        # A transpose wants every input to matter; tensors of an image tower reach no parameter.
        used = _used(convert, tensors)
        # Loading only permutes and stacks, a linear map with one 1 in each row: its transpose is
        # its inverse, so no table of the way back has to be kept true to tunix's.
        (back,) = jax.linear_transpose(convert, used)(dict(values))
    if kind.is_tied and "lm_head.weight" in specs:  # some folders have it twice
        back["lm_head.weight"] = values["embedder.input_embedding"]
    return back


def _used(
    convert: Callable[[dict[str, Any]], Any], tensors: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the tensors that the result depends on."""
    names = sorted(tensors)  # the order in which JAX flattens a dict
    jaxpr = jax.make_jaxpr(convert)(dict(tensors)).jaxpr
    live = {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in live for variable in equation.outvars):
            live |= {id(variable) for variable in equation.invars}
    inputs = zip(names, jaxpr.invars, strict=True)
    return {name: tensors[name] for name, variable in inputs if id(variable) in live}


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the configuration with another dtype, under the name that it has for it already.

    Before transformers 5 that name was `torch_dtype`.
    """
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, name: dtype}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
