"""A folder's language model in shapes: what is planned with, without its weights."""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jedit.core.batch import Apply
from jedit.core.checks import COUNT, check_numbers
from jedit.core.paths import parameter_paths
from jedit.models.huggingface import (
    abstract_module,
    family_of,
    pure_model,
    read_config,
    stored_dtype,
)
from jedit.models.shardings import default_shardings


def load_shapes(
    folder: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    num_layers: int | None = None,
) -> tuple[Apply, dict[str, Any], Any]:
    """Return what `load_model` returns, with the parameters' shapes in their places.

    Nothing is read but the configuration and the files' headers; without weights in the folder the
    configuration is enough.

    Args:
        folder: a folder with config.json, such as `load_model` takes.
        dtype: dtype of the parameters; None: the files', or where there are none the one that the
            configuration names, or float32.
        mesh: devices over which `default_shardings` splits the parameters; None: one device.
        num_layers: as many layers instead of the configuration's; None: all of them.

    Returns:
        `(apply, shapes, config)`; each shape says where the parameter lies, if there is a mesh.

    Raises:
        ValueError: what `load_model` refuses in a configuration or in the files' headers, a number
            that is no count, or no such folder.
    """
    check_numbers(COUNT, num_layers=num_layers)
    folder = Path(folder)
    config = read_config(folder)
    if dtype is None:
        dtype = _dtype_of(folder, config)
    if num_layers is not None:
        config = _with_layers(config, num_layers)
    kind = family_of(config, dtype)
    module = abstract_module(kind)
    apply, shapes = pure_model(kind, module)
    places = None if mesh is None else default_shardings(module, mesh)
    leaves = [
        jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.dtype(dtype),
            sharding=None if places is None else places(path, leaf.shape),
        )
        for path, leaf in parameter_paths(shapes)
    ]
    return apply, jax.tree.unflatten(jax.tree.structure(shapes), leaves), config


def _dtype_of(folder: Path, config: Any) -> jnp.dtype:
    """Return the dtype of a folder's weights, or of those that its configuration names.

    Raises:
        ValueError: the configuration names no dtype of weights.
    """
    if any(folder.glob("*.safetensors")):
        return stored_dtype(folder)
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if named is None:
        return jnp.dtype(jnp.float32)
    try:
        found = jnp.dtype(str(named).removeprefix("torch."))
    except TypeError:  # such as "auto", which leaves it to the files
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f"{folder / 'config.json'}: its dtype is {named!s:.60}, which no weights have; name "
            "one such as bfloat16, or lay the weights beside it"
        )
    return found


def _with_layers(config: Any, num_layers: int) -> Any:
    """Return the configuration of a model with as many layers, of the kinds of the first ones."""
    config = copy.deepcopy(config)
    before = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == before and name != "architectures":
            setattr(config, name, (value * -(-num_layers // before))[:num_layers])
    config.num_hidden_layers = num_layers
    return config
