"""The converter of llama2.c's files against run.c's arithmetic and its merge loop."""

import json
import struct

import numpy as np
import pytest
import tokenizers
from numpy.testing import assert_allclose

from jedit.models import convert_llama2c, greedy_decode, load_model
from jedit.models.llama2c import build_tokenizer
from tests.llm import llama2c_reference as reference

BEGINNING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
)
TEXTS = [
    BEGINNING,
    "Lily's mom said, \"Lily, let's go to the park.\"\nLily was sad — very sad!!!",
    "",
    " ",
    "   three spaces, then two  and a tab\t.",
    "\n\n",
    "Zoë ate 12 crêpes … 漢字 🙂 and a ▁ mark",
    "aaaaaaa lllll ....... ''''' heeeeello",
    "supercalifragilisticexpialidocious",
    "\x00\x7f control",
]


def tokenizer_of(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_logits_are_those_of_run_c(stories, stories_model):
    header, tensors = reference.read(stories / "checkpoint_legacy.bin")
    apply, params, _ = stories_model
    tokens = np.random.default_rng(0).integers(1, 512, (2, 40))
    got = np.asarray(apply(params, tokens))
    want = np.stack([reference.logits(header, tensors, row) for row in tokens])
    assert got.dtype == np.float32
    assert_allclose(got, want, rtol=0, atol=1e-4)


def test_the_documented_story(stories_folder, stories_model):
    apply, params, _ = stories_model
    tokens = np.asarray(greedy_decode(apply, params, np.array([[1]]), 60))[0].tolist()
    assert tokenizer_of(stories_folder).decode(tokens).startswith(BEGINNING)


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_is_that_of_run_c(text, stories, stories_folder):
    tokenizer = tokenizer_of(stories_folder)
    ids = tokenizer.encode(text).ids
    assert ids == reference.encode(reference.read_tokens(stories / "tokenizer.bin"), text)
    assert tokenizer.decode(ids) == text


def test_encoding_of_much_text(stories, stories_folder):
    tokens = reference.read_tokens(stories / "tokenizer.bin")
    tokenizer = tokenizer_of(stories_folder)
    rng = np.random.default_rng(0)
    words = (stories / "doc_stories260K.md").read_text().split()
    for _ in range(60):
        text = " ".join(rng.permutation(words)[:12])
        assert tokenizer.encode(text).ids == reference.encode(tokens, text)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_score_decides_and_not_the_number(stories):
    tokens = reference.read_tokens(stories / "tokenizer.bin")
    scores = np.random.default_rng(0).permutation([score for _, score in tokens[259:]])
    tokens[259:] = [(piece, score) for (piece, _), score in zip(tokens[259:], scores, strict=True)]
    tokenizer = build_tokenizer(tokens)
    assert tokenizer.encode(BEGINNING).ids == reference.encode(tokens, BEGINNING)


def test_transformers_reads_the_tokenizer(stories_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(stories_folder))
    ids = tokenizer(BEGINNING).input_ids
    assert ids == tokenizer_of(stories_folder).encode(BEGINNING).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == BEGINNING
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def toy_files(folder, *, tied, seed=0, dim=8, hidden=6, scale=1.0):
    """A checkpoint with two heads that share a key, and a 260-token tokenizer."""
    vocab = 260
    header = (dim, hidden, 2, 2, 1, vocab if tied else -vocab, 5)
    *_, layers, heads, kv_heads, _, seq = header
    d_kv = dim // heads * kv_heads
    matrices = layers * (2 * dim * dim + 2 * d_kv * dim + 3 * hidden * dim + 2 * dim)
    size = vocab * dim * (1 if tied else 2) + matrices + dim + seq * dim // heads
    numbers = (scale * np.random.default_rng(seed).normal(size=size)).astype("<f4")
    checkpoint, tokens = folder / "toy.bin", folder / "toy_tokenizer.bin"
    checkpoint.write_bytes(struct.pack("<7i", *header) + numbers.tobytes())
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    pieces += [f"<0x{byte:02X}>".encode() for byte in range(256)] + [b" "]
    body = b"".join(struct.pack("<fi", 0.0, len(p)) + p for p in pieces)
    tokens.write_bytes(struct.pack("<i", 7) + body)
    return checkpoint, tokens


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_of_its_own(tied, tmp_path):
    checkpoint, tokens = toy_files(tmp_path, tied=tied)
    folder = convert_llama2c(checkpoint, tokens, tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    apply, params, _ = load_model(folder)
    assert ("lm_head" in params) is not tied
    row = np.array([1, 200, 30, 4, 259])
    want = reference.logits(*reference.read(checkpoint), row)
    got = np.asarray(apply(params, row[None]))[0]
    assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_what_is_no_checkpoint(tmp_path):
    checkpoint, tokens = toy_files(tmp_path, tied=True)
    cut = tmp_path / "cut.bin"
    cut.write_bytes(checkpoint.read_bytes()[:-4])
    with pytest.raises(ValueError, match="the file is cut off"):
        convert_llama2c(cut, tokens, tmp_path / "a")
    cut.write_bytes(b"ak42" * 7)
    with pytest.raises(ValueError, match=r"bytes, its header|its header is"):
        convert_llama2c(cut, tokens, tmp_path / "a")
    cut.write_bytes(b"")
    with pytest.raises(ValueError, match="no legacy checkpoint"):
        convert_llama2c(cut, tokens, tmp_path / "a")
    cut.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends within a token"):
        convert_llama2c(checkpoint, cut, tmp_path / "a")
    more = struct.pack("<fi", 0.0, 1) + b"a"
    cut.write_bytes(tokens.read_bytes() + more)
    with pytest.raises(ValueError, match="261 tokens, .* 260"):
        convert_llama2c(checkpoint, cut, tmp_path / "a")
    cut.write_bytes(tokens.read_bytes()[:4] + more * 300)
    with pytest.raises(ValueError, match="tokens 3 to 258 are not the bytes"):
        convert_llama2c(checkpoint, cut, tmp_path / "a")
