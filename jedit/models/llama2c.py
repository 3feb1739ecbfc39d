"""llama2.c's legacy checkpoints (version 0) as Hugging Face folders.

A checkpoint is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a
negative vocab_size says that the classifier is not tied to the embedding) and float32 tensors one
behind another, each for all layers at once. `tokenizer.bin` is an int32, the longest token's bytes,
and per token a float32 score, an int32 length and the bytes.

Two conventions differ from Hugging Face's. llama2.c rotates neighbouring entries (2i, 2i + 1) of a
head, `transformers` entries (i, i + head_dim / 2): the rows of the query and key projections are
reordered. And llama2.c merges the neighbours whose union has the highest score, where `tokenizers`
wants a ranked list of merges: it is every split of every token into two tokens, the highest score
first. Both then choose the same merge, except between two splits of one token that overlap in the
text ("a aa" and "aa a"): there llama2.c takes the left one, `tokenizers` the one listed first.
"""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from jedit.models._optional import optional

# llama2.c knows them by number: the unknown token, both ends of a text, then the 256 bytes.
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
NUM_RESERVED = 3 + 256


class _Header(NamedTuple):
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int


def convert_llama2c(checkpoint: str | Path, tokenizer: str | Path, folder: str | Path) -> Path:
    """Write a llama2.c model as a folder that `load_model` and `transformers` read.

    Args:
        checkpoint: a legacy export, "stories260K.bin" for example.
        tokenizer: the tokenizer.bin that belongs to it.
        folder: where config.json, model.safetensors, tokenizer.json and tokenizer_config.json go;
            made if need be.

    Returns:
        The folder.

    Raises:
        ValueError: a file is not of the format, or the two do not belong together.
    """
    header, tensors = read_checkpoint(checkpoint)
    pieces = read_tokenizer(tokenizer)
    if len(pieces) != abs(header.vocab_size):
        raise ValueError(
            f"{tokenizer} has {len(pieces)} tokens, {checkpoint} {abs(header.vocab_size)}: they do "
            "not belong together."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    optional("safetensors.numpy").save_file(
        tensors, folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": header.dim,
        "intermediate_size": header.hidden_dim,
        "num_hidden_layers": header.n_layers,
        "num_attention_heads": header.n_heads,
        "num_key_value_heads": header.n_kv_heads,
        "head_dim": header.dim // header.n_heads,
        "vocab_size": abs(header.vocab_size),
        "max_position_embeddings": header.seq_len,
        "tie_word_embeddings": header.vocab_size > 0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_tokenizer(pieces).save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": UNKNOWN,
        "model_max_length": header.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
    return folder


def read_checkpoint(path: str | Path) -> tuple[_Header, dict[str, Float32[np.ndarray, "..."]]]:
    """Read the header, and the tensors under `transformers`' names and in its conventions.

    Raises:
        ValueError: the file is not a legacy checkpoint of llama2.c, or it is cut off.
    """
    data = Path(path).read_bytes()
    size = struct.calcsize("<7i")
    header = _Header(*struct.unpack("<7i", data[:size])) if len(data) >= size else None
    if header is None or min(header[:5]) < 1 or header.seq_len < 1 or header.vocab_size == 0:
        raise ValueError(f"{path} is no legacy checkpoint of llama2.c: its header is {header}.")
    vocab, head_dim = abs(header.vocab_size), header.dim // header.n_heads
    d, hidden, layers = header.dim, header.hidden_dim, header.n_layers
    d_kv = header.n_kv_heads * head_dim
    layer = "model.layers.{}."
    shapes = {
        "model.embed_tokens.weight": (vocab, d),
        layer + "input_layernorm.weight": (layers, d),
        layer + "self_attn.q_proj.weight": (layers, d, d),
        layer + "self_attn.k_proj.weight": (layers, d_kv, d),
        layer + "self_attn.v_proj.weight": (layers, d_kv, d),
        layer + "self_attn.o_proj.weight": (layers, d, d),
        layer + "post_attention_layernorm.weight": (layers, d),
        layer + "mlp.gate_proj.weight": (layers, hidden, d),
        layer + "mlp.down_proj.weight": (layers, d, hidden),
        layer + "mlp.up_proj.weight": (layers, hidden, d),
        "model.norm.weight": (d,),
        "cosines and sines of the positions": (2, header.seq_len, head_dim // 2),
    }
    if header.vocab_size < 0:
        shapes["lm_head.weight"] = (vocab, d)
    wanted = size + 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    if len(data) != wanted:
        raise ValueError(
            f"{path} has {len(data)} bytes, its header {tuple(header)} asks for {wanted}: the file "
            "is cut off or no legacy checkpoint of llama2.c."
        )
    tensors, offset = {}, size
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        value = np.frombuffer(data, "<f4", count, offset).reshape(shape)
        offset += 4 * count
        if "q_proj" in name or "k_proj" in name:
            # llama2.c rotates neighbours (0, 1), (2, 3); transformers rotates (0, d/2), (1, d/2 +
            # 1).
            value = _halves_from_pairs(value, head_dim)
        if "{}" in name:
            tensors |= {name.format(i): np.ascontiguousarray(v) for i, v in enumerate(value)}
        elif name.endswith("weight"):
            tensors[name] = np.ascontiguousarray(value)
    return header, tensors


def _halves_from_pairs(
    weights: Float32[np.ndarray, "layers d_out d_in"], head_dim: int
) -> Float32[np.ndarray, "layers d_out d_in"]:
    """Reorder each head's rows as 0, 2, 4, ... and then 1, 3, 5, ...: pairs become halves."""
    layers, d_out, d_in = weights.shape
    pairs = weights.reshape(layers, d_out // head_dim, head_dim // 2, 2, d_in)
    return pairs.swapaxes(2, 3).reshape(layers, d_out, d_in)


def read_tokenizer(path: str | Path) -> list[tuple[bytes, float]]:
    """Read the tokens of a tokenizer.bin, in order, with their scores.

    Raises:
        ValueError: the file is cut off, or lacks the byte tokens.
    """
    data = Path(path).read_bytes()
    pieces, offset = [], 4
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8
            (piece,) = struct.unpack_from(f"<{length}s", data, offset)
            offset += length
            pieces.append((piece, score))
    except struct.error:
        raise ValueError(f"{path} is no tokenizer of llama2.c: it ends within a token.") from None
    found = [piece for piece, _ in pieces[3:NUM_RESERVED]]
    if found != [f"<0x{byte:02X}>".encode() for byte in range(256)]:
        raise ValueError(f"{path} is no tokenizer of llama2.c: tokens 3 to 258 are not the bytes.")
    return pieces


def build_tokenizer(pieces: list[tuple[bytes, float]]) -> Any:
    """Make a `tokenizers.Tokenizer` that encodes as llama2.c does: with <s> in front, no </s>.

    A space is put before the text, and taken off by decoding; characters that are no token become
    their bytes.
    """
    tokenizers = optional("tokenizers")
    # Spaces stand for themselves in the file. Two special tokens have line ends around them there.
    names = [UNKNOWN, BEGIN, END, *(piece.decode() for piece, _ in pieces[3:])]
    numbers = {name: number for number, name in enumerate(names)}
    merges = []
    for number in range(NUM_RESERVED, len(names)):
        name = names[number]
        for cut in range(1, len(name)):
            left, right = numbers.get(name[:cut]), numbers.get(name[cut:])
            if left is not None and right is not None:
                # llama2.c merges the pair of the highest score first; tokenizers takes the first of
                # a list.
                merges.append((-pieces[number][1], number, left, right))
    merges = [(names[left], names[right]) for _, _, left, right in sorted(merges)]

    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=numbers, merges=merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.add_special_tokens([UNKNOWN, BEGIN, END])
    tokenizer.normalizer = tokenizers.normalizers.Prepend(" ")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 1)]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
