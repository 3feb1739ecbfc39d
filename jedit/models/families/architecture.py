"""What a family of language models is, and what its configuration says of sizes and positions."""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Tensors = Mapping[str, Any]  # NumPy's or traced arrays, by their names in a folder
Table = Mapping[str, tuple[str, Any]]  # tunix's: {pattern of a name: (path, (axes, shape) or None)}


class Architecture(NamedTuple):
    """A model, and how a folder's tensors lie in its parameters.

    `convert` is used forwards and backwards: of arrays that lie in files it makes views shaped as
    the parameters, from which they are read and into which they are written. So it may index,
    transpose, split axes and `Stack`, and must not copy.

    Attributes:
        model_class: the NNX module, made by `model_class(config, rngs=...)`; called with tokens
            (batch, seq), positions, a cache or None and a mask (batch, seq, keys), it returns
            logits and the new cache.
        config: the configuration that it is made with; it has num_layers, num_kv_heads, head_dim.
        convert: `{name of a tensor: array} -> {path of a parameter: array or Stack}`; names that
            it does not know are left out.
        is_tied: whether the embedding is the last layer's matrix too.
        window: number of tokens that each token sees, itself among them; None: all before it.
        finish: changes the module in place, for what tunix's does otherwise.
    """

    model_class: Any
    config: Any
    convert: Callable[[Tensors], dict[str, Any]]
    is_tied: bool
    window: int | None = None
    finish: Callable[[Any], None] = lambda _: None


def with_remat(kind: Architecture) -> Architecture:
    """Return the model with its layers computed anew in the backward pass."""
    if hasattr(kind.config, "remat"):  # ours
        return kind._replace(config=kind.config._replace(remat=True))
    whole_layer = type(kind.config.remat_config).DECODER
    return kind._replace(config=dataclasses.replace(kind.config, remat_config=whole_layer))


def by_table(table: Table) -> Callable[[Tensors], dict[str, Any]]:
    """Make the `convert` of a table in tunix's form."""

    def convert(tensors: Tensors) -> dict[str, Any]:
        found = {}
        for name, value in tensors.items():
            rows = [row for row in table.items() if re.match(row[0], name)]
            if len(rows) != 1:  # in none, or in several, as tunix's loader has it
                continue
            pattern, (path, transform) = rows[0]
            axes, shape = transform or (None, None)
            value = value.transpose(axes) if axes else value
            found[re.sub(pattern, path, name)] = value.reshape(shape) if shape else value
        return found

    return convert


def sizes(config: Any) -> dict[str, Any]:
    """Return the fields that tunix's configurations share."""
    heads = config.num_attention_heads
    rope = rotary(config)
    return {
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "num_kv_heads": config.num_key_value_heads,
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "norm_eps": config.rms_norm_eps,
    }


def expect(config: Any, **allowed: tuple[Any, ...]) -> None:
    """Check that each named field, where the configuration has it, is one of the values given.

    Raises:
        ValueError: a field has another value.
    """
    for name, values in allowed.items():
        value = getattr(config, name, values[0])
        if value not in values:
            wanted = " or ".join(repr(v) for v in values)
            raise ValueError(
                f"{config.model_type} with {name} = {value!r} is not supported: the model has "
                f"{wanted}."
            )


def rotary(config: Any) -> dict[str, Any]:
    """Return what is said about rotary positions, by the names of transformers 5 and before."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    # transformers 5 has `rope_parameters`; before, `rope_scaling` stood beside `rope_theta`.
    rope = rope or dict(getattr(config, "rope_scaling", None) or {})
    if "rope_theta" not in rope and getattr(config, "rope_theta", None) is not None:
        rope["rope_theta"] = config.rope_theta
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    return rope


def theta_of(config: Any) -> float:
    """Return the base of rotary positions, which nothing may stretch.

    Raises:
        ValueError: something does.
    """
    rope = rotary(config)
    expect_rope(config, rope, ("default",))
    return float(rope.get("rope_theta", 10_000.0))


def expect_rope(config: Any, rope: Mapping[str, Any], kinds: tuple[str, ...]) -> None:
    """Check the kind of rotary positions.

    Raises:
        ValueError: it is none of these.
    """
    if rope["rope_type"] not in kinds:
        raise ValueError(
            f"{config.model_type} with rope_type {rope['rope_type']!r} is not supported, only "
            f"{' and '.join(kinds)}."
        )


def linear_rope(config: Any, kind: str) -> tuple[float, float]:
    """Return (theta, factor) of one of Gemma 3's two kinds of layers."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if kind in rope:
        rope = dict(rope[kind])
    elif kind == "sliding_attention":
        rope = {"rope_theta": config.rope_local_base_freq}
    else:
        rope = {**(getattr(config, "rope_scaling", None) or {}), "rope_theta": config.rope_theta}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    expect_rope(config, rope, ("default", "linear"))
    return float(rope["rope_theta"]), float(rope.get("factor") or 1.0)


def rope_bases(config: Any, head_dim: int) -> tuple[float, ...]:
    """Return, for each frequency, the base in `frequency[i] = base[i] ** (-2 i / head_dim)`.

    Without scaling every base is rope_theta. Llama 3.1 and later divide the low frequencies by a
    factor, keep the high ones, and blend between (transformers' "llama3").

    Raises:
        ValueError: another kind of scaling, or one that reaches the fastest frequency.
    """
    rope = rotary(config)
    expect_rope(config, rope, ("default", "llama3"))
    theta = float(rope.get("rope_theta", 10_000.0))
    if rope["rope_type"] == "default":
        return (theta,) * (head_dim // 2)
    exponents = np.arange(head_dim // 2) * 2 / head_dim
    frequencies = theta**-exponents
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # How often each turns over the length that the model was first trained with.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    if kept[0] < 1:
        raise ValueError("rope_type 'llama3' that slows the fastest frequency is not supported.")
    scaled = frequencies * (kept + (1 - kept) / rope["factor"])
    # tunix takes a base and not frequencies; one base for each frequency, by broadcasting, is any
    # frequencies at all. The first has exponent 0 and is 1 with any base, hence the refusal above.
    bases = scaled[1:] ** (-1 / exponents[1:])
    return (theta, *bases.tolist())


def with_globals(source: type, method: str, **names: Any) -> type:
    """Make a class whose one method meets other values under its module's global names.

    What tunix does is kept to the letter that way: a copy of its code would fall behind it, and a
    patch of its module would change it for everybody.
    """
    function = getattr(source, method)
    changed = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        method,
        function.__defaults__,
        function.__closure__,
    )
    return type(source.__name__, (source,), {method: changed, "__module__": __name__})
