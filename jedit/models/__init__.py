"""Models as pure functions: each maker or loader returns `(apply, params)`.

`cnn`, `denoiser`, `gpt`, `mlp` and `resnet` are made here. `load_model` and its kin bring a
language model from a Hugging Face folder; they need the extra `llm`, and import it when they are
called.
"""

from jedit.models.cnn import cnn
from jedit.models.decoding import Stepper, cached_decode, greedy_decode, sampled_decode
from jedit.models.denoiser import denoiser
from jedit.models.diffusion import cosine_schedule, denoise, noised, visited_inputs
from jedit.models.experts import Experts, routed
from jedit.models.functional import cast_params, mixed_precision, to_pure
from jedit.models.gpt import gpt, gpt_stepper
from jedit.models.huggingface import load_model, load_stepper, save_model
from jedit.models.llama2c import convert_llama2c
from jedit.models.lora import Adapted, with_lora
from jedit.models.mlp import mlp
from jedit.models.nmda import NMDA
from jedit.models.peft import load_adapter, save_adapter
from jedit.models.resnet import resnet

__all__ = [
    "NMDA",
    "Adapted",
    "Experts",
    "Stepper",
    "cached_decode",
    "cast_params",
    "cnn",
    "convert_llama2c",
    "cosine_schedule",
    "denoise",
    "denoiser",
    "gpt",
    "gpt_stepper",
    "greedy_decode",
    "load_adapter",
    "load_model",
    "load_stepper",
    "mixed_precision",
    "mlp",
    "noised",
    "resnet",
    "routed",
    "sampled_decode",
    "save_adapter",
    "save_model",
    "to_pure",
    "visited_inputs",
    "with_lora",
]
