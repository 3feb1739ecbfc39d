"""What is measured: two models, and how many flops their passes take at the least. Imports no JAX.

The floor of a pass, per position, with P the entries of the selected matrices (biases left out):

    factors       2 P forward, 2 P activation backward, Σ 2 d_in² + 2 d_out² for the moments
    eigenvalues   2 P forward, 2 P activation backward, Σ 2 d_in² + 2 d_out² for the rotations,
                  Σ 2 d_in d_out for the squared gradients

The sums run over the matrices. Moments and rotations are counted in full for every matrix, also
where an input is shared or a product is symmetric; the rest of the model (attention, norms, the
GPT's head) is not counted at all, although every contender has to compute it. Two more jobs have no
pass; their floors are the products that they would be if they were nothing but products:

    eigendecomposition   2 d³ for every factor: one product of two d x d matrices
    solve                Σ 4 d_in² d_out + 4 d_in d_out²: there and back
"""

import dataclasses

JOBS = ("factors", "eigenvalues", "eigendecomposition", "solve")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        name: "mlp" or "gpt".
        sizes: the MLP's widths; for the GPT (vocab, width, num_layers, num_heads).
        positions: per example: 1, or the sequence's length.
        num_examples: of a whole pass.
        batch: examples a batch.
    """

    name: str
    sizes: tuple[int, ...]
    positions: int
    num_examples: int
    batch: int

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(d_in, d_out) of every matrix that gets a curvature block.

        The GPT's are query, key, value, out, up and down of every layer. Its embedding and head are
        left out, for every contender alike: a moment of 4,096 logits would be most of the work.
        """
        if self.name == "mlp":
            return tuple(zip(self.sizes[:-1], self.sizes[1:], strict=True))
        _, width, num_layers, _ = self.sizes
        layer = (*(((width, width),) * 4), (width, 4 * width), (4 * width, width))
        return layer * num_layers

    @property
    def select(self) -> str | None:
        """The same matrices, and their biases, as a pattern on parameter paths."""
        return None if self.name == "mlp" else r"/(attn|mlp)/\w+/(kernel|bias)$"

    @property
    def num_batches(self) -> int:
        """Batches of a whole pass."""
        return self.num_examples // self.batch

    def floor(self, job: str) -> float:
        """Flops of one step of a job: a batch, or the whole where there are no batches."""
        positions = self.batch * self.positions
        if job == "factors":
            return positions * sum(factor_flops(i, o) for i, o in self.matrices)
        if job == "eigenvalues":
            return positions * sum(eigenvalue_flops(i, o) for i, o in self.matrices)
        if job == "eigendecomposition":
            return sum(2 * i**3 + 2 * o**3 for i, o in self.matrices)
        if job == "solve":
            return sum(4 * i * i * o + 4 * i * o * o for i, o in self.matrices)
        raise ValueError(f"job must be one of {JOBS}, got {job!r}")


def factor_flops(d_in: int, d_out: int) -> int:
    """Per position: through the matrix and back, and the two full moment products."""
    return 4 * d_in * d_out + 2 * d_in**2 + 2 * d_out**2


def eigenvalue_flops(d_in: int, d_out: int) -> int:
    """Per position: through the matrix and back, the two rotations, the gradient."""
    return factor_flops(d_in, d_out) + 2 * d_in * d_out


CASES = {
    "mlp": Case("mlp", (784, 1024, 1024, 10), 1, 8192, 256),
    "gpt": Case("gpt", (4096, 256, 4, 4), 128, 256, 8),
}
TOYS = {
    "mlp": Case("mlp", (12, 16, 5), 1, 64, 16),
    "gpt": Case("gpt", (32, 16, 2, 2), 8, 8, 4),
}

# Falsifiable, one line each: the most a job may cost in units of its floor, and GiB at the peak.
LIMITS = {
    ("mlp", "factors"): (1.0, 0.6),
    ("mlp", "eigenvalues"): (1.1, 0.6),
    ("gpt", "factors"): (1.3, 0.8),
    ("gpt", "eigenvalues"): (1.5, 0.8),
}
