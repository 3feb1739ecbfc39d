"""The torch contender: kronfluence on the same two models. A script that imports nothing from here.

    PYTHON tests/bench/kronfluence_peer.py JSON      prints one line of JSON

PYTHON is an interpreter with torch and kronfluence, which need not be jedit's own (see
`tests.bench`), and JSON what `request` in `tests.bench.child` makes of a case. Kronfluence's own
loops over a list of batches are timed, so that neither data loaders nor files are.
"""

import json
import math
import resource
import sys
import time

import torch
from kronfluence import prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
from kronfluence.task import Task
from kronfluence.utils.state import State
from torch import nn
from torch.nn import functional as F  # noqa: N812

SEGMENT = 8  # batches; its EK-FAC pass of the MLP takes many times as long as anybody else's


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


class _Sampled(Task):
    """Cross-entropy summed over outputs, at labels sampled from the model."""

    def __init__(self, tracked):
        self.tracked = tracked

    def get_influence_tracked_modules(self):
        return self.tracked

    def compute_train_loss(self, batch, model, sample=False):
        del sample
        logits = model(batch)
        logits = logits.reshape(-1, logits.shape[-1])
        with torch.no_grad():
            labels = torch.multinomial(torch.softmax(logits, dim=-1), 1)[:, 0]
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def make(request):
    """(model, task, batches)."""
    torch.manual_seed(0)
    examples, positions, sizes = (request[k] for k in ("num_examples", "positions", "sizes"))
    if request["name"] == "mlp":
        layers = [nn.Linear(i, o) for i, o in request["matrices"]]
        model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])
        data, tracked = torch.randn(examples, sizes[0]), None
    else:
        model = _Gpt(*sizes, positions)
        data = torch.randint(sizes[0], (examples, positions))
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        tracked = [name for name in linear if name != "head"]
    return model, _Sampled(tracked), list(data.split(request["batch"]))


def matmul_rate(size: int, repeats: int = 3) -> float:
    """Flops a second of torch's own float32 matrix product."""
    x = torch.ones(size, size)
    x @ x
    begin = time.perf_counter()
    for _ in range(repeats):
        x @ x
    return 2 * size**3 * repeats / (time.perf_counter() - begin)


def measure(request) -> dict:
    """Segments of a pass, in the form of `tests.bench.measure.measure`; seconds of a whole one."""
    model, task, batches = make(request)
    model = prepare_model(model, task)
    arguments = FactorArguments(use_empirical_fisher=False)
    state = State()
    options = {
        "model": model,
        "state": state,
        "task": task,
        "factor_args": arguments,
        "disable_tqdm": True,
    }

    def factors(loader):
        return fit_covariance_matrices_with_loader(loader=loader, **options)[1]

    if request["job"] == "factors":
        once = factors
    else:
        rows = request["batch"] * request["positions"]
        enough = math.ceil(4 * max(max(m) for m in request["matrices"]) / rows)
        covariances = factors(batches[:enough])
        eigen = perform_eigendecomposition(covariances, model, state, arguments, disable_tqdm=True)

        def once(loader):
            return fit_lambda_matrices_with_loader(loader=loader, eigen_factors=eigen, **options)[1]

    once(batches[:SEGMENT])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds, multiples, rates = [], [], []
    for _ in range(request["repeats"]):
        before = matmul_rate(request["size"])
        begin = time.perf_counter()
        once(batches[:SEGMENT])
        elapsed = time.perf_counter() - begin
        after = matmul_rate(request["size"])
        rate = 2 / (1 / before + 1 / after)
        number = len(batches[:SEGMENT])
        multiples.append(elapsed * rate / (request["floor"] * number))
        seconds.append(elapsed * len(batches) / number)
        rates += [before, after]
    return {"seconds": seconds, "multiples": multiples, "rates": rates, "peak_gib": peak}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
