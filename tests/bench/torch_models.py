"""The two models in torch, and the timing, for the contenders in torch. Imports nothing from here.

Scripts of this folder that an interpreter of their own runs take it from beside them.
"""

import resource
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

SEGMENT = 8  # batches; an EK-FAC pass in torch may take many times as long as anybody else's


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        batch, seq, width = x.shape
        shape = (batch, seq, self.num_heads, width // self.num_heads)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, seq, width))


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attn_norm, self.attn = nn.LayerNorm(width), _Attention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class _Gpt(nn.Module):
    def __init__(self, vocab: int, width: int, num_layers: int, num_heads: int, seq: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(0.02 * torch.randn(seq, width))
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make(request: dict) -> tuple[nn.Module, list[torch.Tensor]]:
    """Return the model that is asked for, with random parameters, and the batches."""
    torch.manual_seed(0)
    examples, positions, sizes = (request[k] for k in ("num_examples", "positions", "sizes"))
    if request["name"] == "mlp":
        layers = [nn.Linear(i, o) for i, o in request["matrices"]]
        model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])
        data = torch.randn(examples, sizes[0])
    else:
        model = _Gpt(*sizes, positions)
        data = torch.randint(sizes[0], (examples, positions))
    return model, list(data.split(request["batch"]))


def tracked(model: nn.Module) -> list[str]:
    """Return the names of the matrices that get a block: all but the GPT's head."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if name != "head"]


def matmul_rate(size: int, repeats: int = 3) -> float:
    """Flops a second of torch's own float32 matrix product."""
    x = torch.ones(size, size)
    x @ x
    begin = time.perf_counter()
    for _ in range(repeats):
        x @ x
    return 2 * size**3 * repeats / (time.perf_counter() - begin)


def measure(once: Callable[[list], object], batches: list, request: dict) -> dict:
    """Time segments of a pass, in the form of `tests.bench.measure.measure`.

    Args:
        once: runs the job over a list of batches.
        batches: those of a whole pass.
        request: what was asked for.

    Returns:
        The measurement; its seconds are those of a whole pass.
    """
    segment = batches[:SEGMENT]
    once(segment)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds, multiples, rates = [], [], []
    for _ in range(request["repeats"]):
        before = matmul_rate(request["size"])
        begin = time.perf_counter()
        once(segment)
        elapsed = time.perf_counter() - begin
        after = matmul_rate(request["size"])
        rate = 2 / (1 / before + 1 / after)
        multiples.append(elapsed * rate / (request["floor"] * len(segment)))
        seconds.append(elapsed * len(batches) / len(segment))
        rates += [before, after]
    return {"seconds": seconds, "multiples": multiples, "rates": rates, "peak_gib": peak}
