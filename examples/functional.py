"""Compress a network that calls its activations as functions. Seconds on one CPU core, offline.

    python examples/functional.py

Networks in the style of timm write `F.relu(self.bn1(self.conv1(x)))` and `x + shortcut` in their own forward. A tensor
can only be quantized where a module returns it, or where one layer alone reads it. Coverage lists the few others, and
what to write instead: `Blocks(named=True)` does so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qprune

EPOCHS, STEPS, BATCH = 9, 8, 32


class SqueezeExcite(nn.Module):
    """Scale channels by a function of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        means = x.mean((2, 3), keepdim=True)
        return x * self.expand(F.silu(self.reduce(means))).sigmoid()


class Block(nn.Module):
    """Two convolutions and a shortcut. named: whether a module returns the tensor that several functions read."""

    def __init__(self, channels: int, named: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.attend = SqueezeExcite(channels)
        # Two functions read this tensor (the means and the product): only a module makes it a site.
        self.act = nn.SiLU() if named else F.silu

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        return F.relu(x + self.attend(y))


class Blocks(nn.Module):
    """A stem, blocks, and a linear layer on the means."""

    def __init__(self, channels: int = 16, blocks: int = 3, named: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.blocks = nn.ModuleList(Block(channels, named) for _ in range(blocks))
        self.head = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 2)."""
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def rings(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw noisy pictures (N, 3, 16, 16) of a ring or a disc, and the class (N,)."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (samples,), generator=random)
    centre = 8 + 4 * (torch.rand(samples, 2, 1, 1, generator=random) - 0.5)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    distance = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2).sqrt()
    shape = (distance < 5) & ((labels == 0)[:, None, None] | (distance > 2.5))
    return shape.float()[:, None] + 0.3 * torch.randn(samples, 3, 16, 16, generator=random), labels


def compressed(named: bool) -> float:
    """Train a compressed network, print its coverage, and return its size in Mb."""
    torch.manual_seed(0)
    network = Blocks(named=named)
    images, labels = rings(STEPS * BATCH, seed=1)
    test_images, test_labels = rings(256, seed=2)
    schedule = qprune.Schedule(t_p=2, dt_p=1, n=4, t_qw=7, t_qf=7.5)
    compressor = qprune.compress(
        network,
        images[:BATCH],
        schedule,
        steps_per_epoch=STEPS,
        batch_size=BATCH,
        quantize=qprune.QuantizeConfig(bits=6, feature_bits=8),
        exclude=["head"],  # its weight and its features stay float
    )
    print(qprune.coverage(network, images[:1]))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            batch = slice(step * BATCH, (step + 1) * BATCH)
            compressor.at(epoch * STEPS + step)
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    small = compressor.convert().eval()
    with torch.no_grad():
        outputs = small(test_images)
    print("converted outputs equal:", torch.equal(outputs, network.eval()(test_images)))
    print(f"accuracy: {100 * (outputs.argmax(1) == test_labels).float().mean().item():.1f} %")
    return qprune.actual_footprint(network, images[:1]).size_bits() / 1e6


def main() -> None:
    """Compare the same network with functions and with modules."""
    functions = compressed(named=False)
    modules = compressed(named=True)
    print(f"size: {functions:.2f} Mb with functions, {modules:.2f} Mb with the activation as a module")


if __name__ == "__main__":
    main()
