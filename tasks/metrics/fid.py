"""The Frechet distance of two sets of pictures (Heusel et al. 2017), by Inception features or by a stand-in."""

from __future__ import annotations

import hashlib
import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from qprune.errors import UserError, one_of
from qprune.tasks.data.seeds import generator
from qprune.training.task import DataOptions, Limits

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
CHECKSUM_START = "6726825d"  # of the file's sha256, in its name
EXTRACTORS = ("auto", "inception", "proxy")
PER_PASS = 16  # pictures per forward pass of the extractor


class FrechetDistance:
    """Distance of generated pictures to real ones, from 0 (alike) up.

    Args:
        extractor: `inception` is the published FID; the metric's name is `fid`. `proxy` uses features of random
            convolutions and needs no file; its name is `fid_proxy`, and it compares with no published figure.
        weights: File of the Inception network, with the published checksum; by default in torch hub's cache.

    Raises:
        UserError: The weights are missing or different.
    """

    def __init__(self, extractor: str, weights: str | None = None) -> None:
        one_of("task.fid", extractor, EXTRACTORS[1:])
        self.name = "fid" if extractor == "inception" else "fid_proxy"
        self.weights = inception_weights(weights) if extractor == "inception" else None

    @torch.no_grad()
    def __call__(self, real: Tensor, generated: Tensor) -> float:
        """Compare pictures (N, 3, H, W) and (M, 3, H, W) in uint8; sets of one picture are a UserError."""
        if min(len(real), len(generated)) < 2:
            raise UserError(
                f"{self.name} compares sets of pictures, and one of them holds {min(len(real), len(generated))}; give "
                "budget.test_samples=2 or more, or more test pictures"
            )
        device = generated.device
        metric = self._metric().to(device)
        with torch.autocast(device.type, enabled=False):
            for pictures, is_real in ((real, True), (generated, False)):
                for part in pictures.split(PER_PASS):
                    metric.update(part.to(device), real=is_real)
            return max(0.0, float(metric.compute()))

    def _metric(self) -> FrechetInceptionDistance:
        if self.weights is None:
            return FrechetInceptionDistance(feature=RandomFeatures())
        return FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(self.weights))


def distance_of(fid: str, weights: str | None, data: DataOptions, limits: Limits) -> FrechetDistance:
    """Build the distance of `task.fid`: `auto` is `inception` for the whole recipe on real data, else `proxy`."""
    one_of("task.fid", fid, EXTRACTORS)
    whole = data.source == "real" and limits.steps_per_epoch is None
    return FrechetDistance(("inception" if whole else "proxy") if fid == "auto" else fid, weights)


class RandomFeatures(nn.Module):
    """Pictures (N, 3, H, W) in uint8 -> (N, 112): mean responses of three random convolutions at falling resolution.

    The weights are fixed by this code, so that figures of different runs compare.
    """

    num_features = 112
    first: Tensor
    second: Tensor
    third: Tensor

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 16, 32, 64)
        for name, inputs, outputs in zip(("first", "second", "third"), channels, channels[1:], strict=False):
            kernel = torch.randn(outputs, inputs, 3, 3, generator=generator(0, "features", name))
            self.register_buffer(name, kernel / math.sqrt(9 * inputs / 2), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.float().div(127.5).sub(1)
        means = []
        for kernel in (self.first, self.second, self.third):
            x = F.relu(F.conv2d(x, kernel, stride=2, padding=1))
            means.append(x.mean(dim=(2, 3)))
        return torch.cat(means, dim=1)


def inception_weights(given: str | None) -> Path:
    """Find and check the file of FID's Inception network, or raise UserError with the remedy."""
    path = Path(given) if given is not None else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    remedy = (
        f"fetch {WEIGHTS_URL} and name it with task.inception_weights=FILE or put it into {path.parent}, or type "
        "task.fid=proxy for a stand-in that needs no file and is called fid_proxy"
    )
    if not path.is_file():
        raise UserError(f"there are no Inception weights at {path}, and FID needs them; {remedy}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(CHECKSUM_START):
        raise UserError(
            f"{path} is not the Inception network of FID: its sha256 is {found[:8]}..., not 6726825d...; {remedy}"
        )
    if find_spec("torch_fidelity") is None:  # with which torchmetrics builds the network
        raise UserError(
            "FID needs the package torch-fidelity; type: pip install 'qprune[fid]', or task.fid=proxy for a stand-in "
            "that is called fid_proxy"
        )
    return path
