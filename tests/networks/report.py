"""The table of the zoo in results/networks.md."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import qprune
from qprune.compression.compressor import Compressor, compress
from qprune.compression.schedule import Schedule
from tests.networks.zoo import BATCH, Network

PAGE = Path(__file__).parents[2] / "results" / "networks.md"
SCHEDULE = Schedule(t_p=0, dt_p=1, n=2, t_qw=3, t_qf=4)
STEPS = 6


def attached(entry: Network) -> Compressor:
    """Build a network of the zoo and compress it."""
    torch.manual_seed(0)
    network = entry.make()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.03:  # zeros, or for layers that are not as narrow
                parameter.normal_(std=0.1)
    return compress(network, entry.example(), SCHEDULE, 1, BATCH, entry.prune)


def train(entry: Network, compressor: Compressor) -> None:
    """Train a network of the zoo through all phases."""
    optimizer = torch.optim.SGD(compressor.network.parameters(), lr=1e-3)
    for step in range(STEPS):
        compressor.at(step)
        optimizer.zero_grad()
        entry.loss(compressor.network.train(), entry.example()).backward()
        optimizer.step()


def seconds_of_step(network: torch.nn.Module, entry: Network, steps: int = 9) -> float:
    """Return the median time of a forward and a backward pass."""
    example, times = entry.example(), []
    for _ in range(steps):
        start = time.perf_counter()
        entry.loss(network.train(), example).backward()
        times.append(time.perf_counter() - start)
    return median(times)


@dataclass(frozen=True)
class Row:
    """What `compress` takes of a network: tensors and elements, of weights and of features."""

    name: str
    library: str
    weights: str
    features: str

    @classmethod
    def of(cls, entry: Network, network: torch.nn.Module, said: qprune.Coverage) -> Row:
        """Count what coverage does not list."""
        elements = {
            "weight": sum(p.numel() for p in network.parameters() if p.dim() > 1),
            "feature": qprune.actual_footprint(network, entry.example()).elements("feature", "input"),
        }
        shares = []
        for kind, whole in elements.items():
            floats = [tensor for tensor in said.tensors if tensor.kind == kind]
            kept = whole - sum(tensor.elements for tensor in floats)
            # Rounded down: 100 % is everything.
            shares.append(f"{said.of[kind] - len(floats)}/{said.of[kind]} ({kept * 1000 // whole / 10}%)")
        return cls(entry.name, entry.library, *shares)

    def __str__(self) -> str:
        return f"| {self.name} | {self.library} | {self.weights} | {self.features} |"
