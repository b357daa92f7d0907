"""Compress a small transformer encoder, `nn.TransformerEncoder` as torch ships it. Seconds on one CPU core, offline.

    python examples/transformer.py

The task: does the first token of a sequence occur again? Sequences differ in length, so masks have one entry per
channel (`granularity="last"`); a mask with positions would fit one length only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qprune

EPOCHS, STEPS, BATCH, TOKENS, CHANNELS = 18, 24, 64, 8, 32


class Encoder(nn.Module):
    """Embeddings of tokens and positions, two layers of attention, and a linear layer on the first position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, CHANNELS)
        self.positions = nn.Embedding(16, CHANNELS)
        self.sum = nn.Identity()  # a module returns the sum, so that it can be quantized
        layer = nn.TransformerEncoderLayer(CHANNELS, 4, 2 * CHANNELS, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(CHANNELS, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) whole numbers -> (N, 2)."""
        x = self.sum(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        return self.head(self.encoder(x)[:, 0])


def sequences(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw tokens (N, T), and whether the first one occurs again (N,)."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS, (BATCH, length), generator=random)
    return tokens, (tokens[:, 1:] == tokens[:, :1]).any(1).long()


def main() -> None:
    """Train, prune and quantize, and print the result."""
    torch.manual_seed(0)
    network = Encoder()
    example, _ = sequences(8, seed=0)
    schedule = qprune.Schedule(t_p=8, dt_p=1.5, n=4, t_qw=15, t_qf=16)
    compressor = qprune.compress(
        network,
        example,
        schedule,
        steps_per_epoch=STEPS,
        batch_size=BATCH,
        prune=qprune.PruneConfig(sparsity=0.5, granularity="last"),
        include=["sum", "encoder.**"],
    )
    print(qprune.coverage(network, example))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(EPOCHS * STEPS):
        tokens, labels = sequences(6 + step % 4, seed=1 + step)  # 6 to 9 tokens
        compressor.at(step)
        F.cross_entropy(network(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    small = compressor.convert().eval()
    network.eval()
    equal, correct = True, []
    with torch.no_grad():
        for length in (6, 9, 12):  # and longer than in training
            tokens, labels = sequences(length, seed=-length)
            equal &= torch.equal(small(tokens), network(tokens))
            correct.append((small(tokens).argmax(1) == labels).float().mean().item())
    print("sparsity:", {kind: round(zeros, 3) for kind, zeros in compressor.sparsity.items()})
    print("converted outputs equal:", equal)
    print("accuracy at 6, 9 and 12 tokens:", ", ".join(f"{100 * share:.1f} %" for share in correct))


if __name__ == "__main__":
    main()
