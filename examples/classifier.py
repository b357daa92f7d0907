"""Compress a classifier of torchvision in a training loop of your own. Seconds on one CPU core, offline.

    python examples/classifier.py

The network is torchvision's ResNet with one block a stage; any other of its classifiers works the same way. `compress`
finds the tensors that layers read, sums of residual blocks included, by running one batch. The pictures are stripes and
the class is their direction, so that there is something to learn.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import qprune

EPOCHS, STEPS, BATCH, CLASSES = 9, 5, 24, 4


def stripes(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw noisy pictures (N, 3, 32, 32) of stripes, and their directions (N,), one of `CLASSES`."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=random)
    angle = (labels * math.pi / CLASSES)[:, None, None]
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    phase = torch.rand(samples, 1, 1, generator=random) * 2 * math.pi
    waves = torch.sin(0.8 * (x * angle.cos() + y * angle.sin()) + phase)
    return waves[:, None] + 0.3 * torch.randn(samples, 3, 32, 32, generator=random), labels


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in percent."""
    was_training = network.training
    network.eval()
    correct = (network(images).argmax(1) == labels).float().mean().item()
    network.train(was_training)
    return 100 * correct


def main() -> None:
    """Train, prune and quantize, and print the result."""
    torch.manual_seed(0)
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    images, labels = stripes(STEPS * BATCH, seed=1)
    test_images, test_labels = stripes(128, seed=2)

    # Epochs: prune at 3, 4, 5 and 6 up to half, then quantize weights at 7 and features at 7.5.
    schedule = qprune.Schedule(t_p=2, dt_p=1, n=4, t_qw=7, t_qf=7.5)
    compressor = qprune.compress(network, images[:BATCH], schedule, steps_per_epoch=STEPS, batch_size=BATCH)
    print(qprune.coverage(network, images[:BATCH]))

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images))
        for step in range(STEPS):
            batch = order[step * BATCH : (step + 1) * BATCH]
            compressor.at(epoch * STEPS + step)  # masks and fraction bits change here, when the schedule says so
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with compressor.evaluating():  # a test picture must not be observed
            print(f"epoch {epoch + 1}: {accuracy(network, test_images, test_labels):.1f} %")

    small = compressor.convert().eval()  # an ordinary module: save it, script it, export it
    print("sparsity:", {kind: round(zeros, 3) for kind, zeros in compressor.sparsity.items()})
    print("converted outputs equal:", torch.equal(small(test_images), network.eval()(test_images)))
    size = qprune.actual_footprint(network, images[:1])
    floats = 32 * sum(entry.elements for entry in size.entries)
    print(f"size: {floats / 1e6:.1f} Mb as floats, {size.size_bits() / 1e6:.1f} Mb now")


if __name__ == "__main__":
    main()
