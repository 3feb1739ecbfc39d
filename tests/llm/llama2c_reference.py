"""llama2.c's run.c once more in plain Python and NumPy: its forward pass and its tokenizer."""

import struct

import numpy as np


def read(path):
    """(header, tensors) in the file's own layout, float64."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, seq = struct.unpack("<7i", data[:28])
    numbers = np.frombuffer(data, "<f4", offset=28).astype(np.float64)
    head = dim // heads
    tensors, start = {}, 0
    for name, shape in [
        ("embedding", (abs(vocab), dim)),
        ("attn_norm", (layers, dim)),
        ("wq", (layers, heads * head, dim)),
        ("wk", (layers, kv_heads * head, dim)),
        ("wv", (layers, kv_heads * head, dim)),
        ("wo", (layers, dim, heads * head)),
        ("ffn_norm", (layers, dim)),
        ("w1", (layers, hidden, dim)),
        ("w2", (layers, dim, hidden)),
        ("w3", (layers, hidden, dim)),
        ("norm", (dim,)),
        ("cos", (seq, head // 2)),
        ("sin", (seq, head // 2)),
        ("wcls", (abs(vocab), dim)),
    ]:
        if name == "wcls" and vocab > 0:
            tensors[name] = tensors["embedding"]
            break
        size = int(np.prod(shape))
        tensors[name] = numbers[start : start + size].reshape(shape)
        start += size
    assert start == numbers.size
    return (dim, hidden, layers, heads, kv_heads, vocab, seq), tensors


def logits(header, tensors, tokens):
    """Logits (seq, vocab) of one sequence; queries and keys turn in neighbouring pairs."""
    dim, _, layers, heads, kv_heads, _, _ = header
    head, seq = dim // heads, len(tokens)
    angles = np.arange(seq)[:, None] / 10000 ** (np.arange(0, head, 2) / head)

    def norm(x, gain):
        return gain * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5)

    def turn(x):
        complex_x = x[..., 0::2] + 1j * x[..., 1::2]
        turned = complex_x * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = tensors["embedding"][tokens]
    for i in range(layers):
        h = norm(x, tensors["attn_norm"][i])
        query = turn((h @ tensors["wq"][i].T).reshape(seq, heads, head))
        key = turn((h @ tensors["wk"][i].T).reshape(seq, kv_heads, head))
        value = (h @ tensors["wv"][i].T).reshape(seq, kv_heads, head)
        mixed = np.zeros((seq, heads, head))
        for j in range(heads):
            k = j // (heads // kv_heads)
            for t in range(seq):
                scores = key[: t + 1, k] @ query[t, j] / np.sqrt(head)
                weights = np.exp(scores - scores.max())
                mixed[t, j] = weights @ value[: t + 1, k] / weights.sum()
        x = x + mixed.reshape(seq, dim) @ tensors["wo"][i].T
        h = norm(x, tensors["ffn_norm"][i])
        gate = h @ tensors["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ tensors["w3"][i].T)) @ tensors["w2"][i].T
    return norm(x, tensors["norm"]) @ tensors["wcls"].T


def read_tokens(path):
    """[(bytes, score)] of a tokenizer.bin."""
    data = path.read_bytes()
    tokens, at = [], 4
    while at < len(data):
        score, length = struct.unpack("<fi", data[at : at + 8])
        tokens.append((data[at + 8 : at + 8 + length], score))
        at += 8 + length
    return tokens


def encode(tokens, text):
    """run.c's encode(): <s>, a space, one token per character, then the best merge until none."""
    numbers = {piece: i for i, (piece, _) in enumerate(tokens)}
    ids = [1]
    if text:
        ids.append(numbers[b" "])
    for character in text:
        piece = character.encode()
        ids += [numbers[piece]] if piece in numbers else [byte + 3 for byte in piece]
    while True:
        best = None
        for i in range(len(ids) - 1):
            merged = numbers.get(tokens[ids[i]][0] + tokens[ids[i + 1]][0])
            if merged is not None and (best is None or tokens[merged][1] > best[0]):
                best = (tokens[merged][1], merged, i)
        if best is None:
            return ids
        _, merged, i = best
        ids[i : i + 2] = [merged]
