"""tunix's language models, told apart by a Hugging Face configuration.

tunix has the models and knows which tensor of a folder is which of their parameters; what is here
says which of its models a configuration asks for, and refuses what that model does not compute.
"""

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jedit.models._optional import optional


class Architecture(NamedTuple):
    """One of tunix's models, and how a folder's tensors become its parameters.

    Attributes:
        model_class: the NNX module, made by `model_class(config, rngs=...)`.
        config: tunix's own configuration of the model.
        key_mapping: `config -> {pattern of a tensor's name: (its path, (axes, shape) or None)}`.
        preprocess: makes the function that stacks tensors that are one parameter; or None.
        is_tied: whether the embedding is the last layer's matrix too.
        finish: a function that changes the loaded module in place.
    """

    model_class: Any
    config: Any
    key_mapping: Callable[[Any], Mapping[str, Any]]
    preprocess: Callable[[], Callable] | None
    is_tied: bool
    finish: Callable[[Any], None]


def architecture(config: Any, dtype: DTypeLike) -> Architecture:
    """Find the tunix model that a `transformers` configuration describes.

    Args:
        config: a configuration as `transformers.AutoConfig` reads it.
        dtype: dtype of the parameters and of the computation.

    Returns:
        What is needed to load it.

    Raises:
        ValueError: tunix has no such model, or the configuration asks for what its model lacks.
    """
    makers = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3}
    makers |= {"gemma3_text": _gemma3, "gemma": _gemma}
    if config.model_type not in makers:
        names = getattr(config, "architectures", None) or [config.model_type]
        raise ValueError(
            f"{', '.join(names)} (model_type {config.model_type!r}) is not supported; these are: "
            f"{', '.join(makers)}."
        )
    return makers[config.model_type](config, jnp.dtype(dtype))


def _llama(config: Any, dtype: Any) -> Architecture:
    del dtype  # the computation follows the parameters
    _expect(config, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,))
    model = optional("tunix.models.llama3.model")
    params = optional("tunix.models.llama3.params")
    sizes = _sizes(config)
    bases = _rope_bases(config, sizes["head_dim"])
    return Architecture(
        model.Llama3,
        model.ModelConfig(**sizes, weight_tying=config.tie_word_embeddings),
        params._get_key_and_transform_mapping,
        None,
        config.tie_word_embeddings,
        lambda module: _rotate(module, model, bases),
    )


def _qwen2(config: Any, dtype: Any) -> Architecture:
    _expect(config, hidden_act=("silu",), use_sliding_window=(False,))
    _plain_theta(config)
    model = optional("tunix.models.qwen2.model")
    params = optional("tunix.models.qwen2.params")
    tied = config.tie_word_embeddings
    return Architecture(
        model.Qwen2,
        model.ModelConfig(
            **_sizes(config), use_tied_embedding=tied, dtype=dtype, param_dtype=dtype
        ),
        params._get_key_and_transform_mapping,
        None,
        tied,
        _nothing,
    )


def _qwen3(config: Any, dtype: Any) -> Architecture:
    _expect(config, hidden_act=("silu",), use_sliding_window=(False,), attention_bias=(False,))
    model = optional("tunix.models.qwen3.model")
    params = optional("tunix.models.qwen3.params")
    sizes, tied = _sizes(config), config.tie_word_embeddings
    bases = _rope_bases(config, sizes["head_dim"])
    return Architecture(
        model.Qwen3,
        model.ModelConfig(**sizes, use_tied_embedding=tied, dtype=dtype, param_dtype=dtype),
        params._get_key_and_transform_mapping,
        None,
        tied,
        lambda module: _rotate(module, model, bases),
    )


def _gemma3(config: Any, dtype: Any) -> Architecture:
    _expect(
        config,
        hidden_activation=("gelu_pytorch_tanh",),
        attention_bias=(False,),
        rms_norm_eps=(1e-6,),
        final_logit_softcapping=(None,),
        attn_logit_softcapping=(None,),
        use_bidirectional_attention=(False, None),
        tie_word_embeddings=(True,),
    )
    model = optional("tunix.models.gemma3.model")
    params = optional("tunix.models.gemma3.params_safetensors")
    kinds = {"LOCAL_SLIDING": "sliding_attention", "GLOBAL": "full_attention"}
    cycle = [kinds[kind.name] for kind in model.GEMMA3_ATTENTION_PATTERN]
    pattern = [cycle[i % len(cycle)] for i in range(config.num_hidden_layers)]
    # tunix has the pattern as a constant; a model with another one would load and compute wrongly.
    _expect(config, layer_types=(pattern,))
    (local_theta, local_scale), (theta, scale) = (
        _linear_rope(config, kind) for kind in ("sliding_attention", "full_attention")
    )
    sizes = _sizes(config)
    norms = model.QueryPreAttentionNormalisation
    scalars = {
        sizes["embed_dim"] // sizes["num_heads"]: (norms.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS),
        sizes["head_dim"]: norms.BY_ONE_OVER_SQRT_HEAD_DIM,
    }
    _expect(config, query_pre_attn_scalar=tuple(scalars))
    names = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")
    settings = model.ModelConfig(
        **{name: sizes[name] for name in names},
        num_embed=sizes["vocab_size"],
        sliding_window_size=config.sliding_window,
        local_base_frequency=local_theta,
        global_base_frequency=theta,
        local_scale_factor=local_scale,
        global_scale_factor=scale,
        query_pre_attn_norm=scalars[config.query_pre_attn_scalar],
        param_dtype=dtype,
    )
    return Architecture(
        model.Gemma3,
        settings,
        params._get_key_and_transform_mapping,
        lambda: params._make_preprocess_fn(settings),
        True,
        _nothing,
    )


def _gemma(config: Any, dtype: Any) -> Architecture:
    del dtype  # the computation follows the parameters
    _expect(
        config,
        hidden_act=("gelu_pytorch_tanh",),
        attention_bias=(False,),
        rms_norm_eps=(1e-6,),
        tie_word_embeddings=(True,),
    )
    if _plain_theta(config) != 10_000:
        raise ValueError(f"tunix's Gemma has rope_theta 10000, not {_plain_theta(config)}.")
    model = optional("tunix.models.gemma.model")
    params = optional("tunix.models.gemma.params_safetensors")
    sizes = _sizes(config)
    names = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")
    settings = model.ModelConfig(
        **{name: sizes[name] for name in names},
        num_embed=sizes["vocab_size"],
        final_logit_softcap=None,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=(model.AttentionType.GLOBAL,) * sizes["num_layers"],
    )

    def key_mapping(settings: Any) -> dict[str, Any]:
        # tunix's table is Gemma 2's. In Gemma 1 this name is the norm before the perceptron.
        table = dict(params._get_key_and_transform_mapping(settings))
        name = r"model\.layers\.([0-9]+)\.post_attention_layernorm\.weight"
        return {**table, name: (r"layers.\1.pre_ffw_norm.scale", None)}

    return Architecture(
        model.Gemma,
        settings,
        key_mapping,
        lambda: params._make_preprocess_fn(settings),
        True,
        _nothing,
    )


def _sizes(config: Any) -> dict[str, Any]:
    """Return the fields that tunix's configurations share."""
    heads = config.num_attention_heads
    rope = _rope(config)
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


def _nothing(module: Any) -> None:
    del module


def _expect(config: Any, **allowed: tuple[Any, ...]) -> None:
    """Check that each named field, where the configuration has it, is one of the values given.

    Raises:
        ValueError: a field has another value.
    """
    for name, values in allowed.items():
        value = getattr(config, name, values[0])
        if value not in values:
            wanted = " or ".join(repr(v) for v in values)
            raise ValueError(
                f"{config.model_type} with {name} = {value!r} is not supported: tunix's model has "
                f"{wanted}."
            )


def _rope(config: Any) -> dict[str, Any]:
    """Return what is said about rotary positions, by the names of transformers 5 and before."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    # transformers 5 has `rope_parameters`; before, `rope_scaling` stood beside `rope_theta`.
    rope = rope or dict(getattr(config, "rope_scaling", None) or {})
    if "rope_theta" not in rope and getattr(config, "rope_theta", None) is not None:
        rope["rope_theta"] = config.rope_theta
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    return rope


def _plain_theta(config: Any) -> float:
    rope = _rope(config)
    _expect_rope(config, rope, ("default",))
    return float(rope.get("rope_theta", 10_000.0))


def _expect_rope(config: Any, rope: Mapping[str, Any], kinds: tuple[str, ...]) -> None:
    if rope["rope_type"] not in kinds:
        raise ValueError(
            f"{config.model_type} with rope_type {rope['rope_type']!r} is not supported, only "
            f"{' and '.join(kinds)}."
        )


def _linear_rope(config: Any, kind: str) -> tuple[float, float]:
    """Return (theta, factor) of one of Gemma 3's two kinds of layers."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if kind in rope:
        rope = dict(rope[kind])
    elif kind == "sliding_attention":
        rope = {"rope_theta": config.rope_local_base_freq}
    else:
        rope = {**(getattr(config, "rope_scaling", None) or {}), "rope_theta": config.rope_theta}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    _expect_rope(config, rope, ("default", "linear"))
    return float(rope["rope_theta"]), float(rope.get("factor") or 1.0)


def _rope_bases(config: Any, head_dim: int) -> tuple[float, ...]:
    """Return, for each frequency, the base in `frequency[i] = base[i] ** (-2 i / head_dim)`.

    Without scaling every base is rope_theta. Llama 3.1 and later divide the low frequencies by a
    factor, keep the high ones, and blend between (transformers' "llama3").

    Raises:
        ValueError: another kind of scaling, or one that reaches the fastest frequency.
    """
    rope = _rope(config)
    _expect_rope(config, rope, ("default", "llama3"))
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


@functools.cache
def _rotating_attention(model: types.ModuleType, bases: tuple[float, ...]) -> type:
    """Make a class of tunix's attention that rotates with the base of the configuration.

    tunix 0.1.7 leaves the base out where Llama 3 and Qwen 3 rotate, which makes it 1,000,000
    whatever the configuration says: 500,000 for Llama 3, 5,000,000 for Qwen 3 4B.
    """

    def apply_rope(inputs: Any, positions: Any, head_dim: int, **_: Any) -> Any:
        base = jnp.asarray(np.asarray(bases, np.float32))
        return model.apply_rope(inputs, positions, head_dim=head_dim, rope_theta=base)

    source = model.Attention
    names = {**source.block.__globals__, "apply_rope": apply_rope}
    # tunix's function is kept to the letter and meets another `apply_rope` under its global name: a
    # copy of its code would fall behind it, and patching the module would change it for everybody.
    block = types.FunctionType(
        source.block.__code__, names, "block", source.block.__defaults__, source.block.__closure__
    )
    return type(source.__name__, (source,), {"block": block, "__module__": __name__})


def _rotate(module: Any, model: types.ModuleType, bases: tuple[float, ...]) -> None:
    for layer in module.layers:
        # The class is changed on the loaded module: its parameters, and their paths, stay as they
        # are.
        layer.attn.__class__ = _rotating_attention(model, bases)
