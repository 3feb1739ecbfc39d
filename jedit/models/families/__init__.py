"""The families of language models that a Hugging Face folder can hold, one file a kin."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jedit.models.families.architecture import Architecture
from jedit.models.families.gemma import gemma, gemma2, gemma3
from jedit.models.families.gpt import gpt2, gpt_neox, phi
from jedit.models.families.llama import llama, mistral, phi3
from jedit.models.families.olmo import olmo2
from jedit.models.families.qwen import qwen2, qwen3, qwen3_moe

__all__ = ["Architecture", "architecture"]

MAKERS = {
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "olmo2": olmo2,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}


def architecture(config: Any, dtype: DTypeLike) -> Architecture:
    """Find the model that a `transformers` configuration describes.

    Args:
        config: a configuration as `transformers.AutoConfig` reads it.
        dtype: dtype of the parameters and of the computation.

    Returns:
        What is needed to load it.

    Raises:
        ValueError: there is no such model, or the configuration asks for what it lacks.
    """
    if config.model_type not in MAKERS:
        names = getattr(config, "architectures", None) or [config.model_type]
        raise ValueError(
            f"{', '.join(names)} (model_type {config.model_type!r}) is not supported; these are: "
            f"{', '.join(MAKERS)}."
        )
    return MAKERS[config.model_type](config, jnp.dtype(dtype))
