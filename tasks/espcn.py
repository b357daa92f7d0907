"""Super resolution by a factor of 3 with ESPCN: 91 training images, tested on Set5 (Appendix B.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop
from torchvision.utils import make_grid

from qprune.config.types import Fraction, Pixels, Rate, Samples
from qprune.errors import UserError
from qprune.tasks.data.batches import TensorBatches
from qprune.tasks.data.checksum import checksum
from qprune.tasks.data.images import NamedImage, read_images
from qprune.tasks.data.parts import kept_apart, part, training_part
from qprune.tasks.data.seeds import seeded
from qprune.tasks.data.source import real_root
from qprune.tasks.data.superres import ImagePairs
from qprune.tasks.data.synthetic import textured_pictures
from qprune.tasks.metrics.psnr import psnr_db
from qprune.tasks.models.espcn import ESPCN
from qprune.tasks.models.modes import evaluating
from qprune.tasks.optimizers import set_learning_rate
from qprune.training.task import VALIDATION, DataOptions, Limits, Task

# Of the decoded images of Yang et al. 2010 (91) and Bevilacqua et al. 2012 (5), in the order of their file names.
PUBLISHED = {
    "train": "b5702ff5217b551004f5e1b011f3e6d5c9afaab0caa9d95b953edb65139230a9",
    "test": "13c23deaf854cdfaadb03c08f5c2d4b296fd37b7b744372c71ee14b630b238a8",
}
SHOWN = 150  # side of a picture that is shown, in pixels at high resolution
SIZE_COUNTED_AT = (170, 170)  # pixels of the input whose features the density charges


class Espcn(Task):
    """Train ESPCN. Score: PSNR of luma in dB, averaged over the images; density: dB per ln(Mb).

    Args:
        data: Where the images come from.
        limits: How much of the recipe is run.
        seed: Of weights and order.
        scale: Magnification.
        patch: Side of a training patch, in pixels at low resolution.
        stride: Distance of training patches, in pixels at low resolution.
        batch_size: Patches per training step.
        learning_rate: Of Adam.
        lr_drop: Fraction of the epochs after which the learning rate is a tenth (160 of 200).
        train_folder: Folder of training images, below data.root or absolute.
        test_folder: Folder of test images.
        further_test_folders: More of them; the PSNR on each is reported as `psnr_db_NAME` beside the score.

    Raises:
        UserError: The data is not usable.
    """

    metric = "psnr_db"
    higher_is_better = True
    validates = True
    density_unit = "dB/ln(Mb)"
    train_batches: TensorBatches
    optimizer: torch.optim.Adam

    def __init__(
        self,
        *,
        data: DataOptions,
        limits: Limits,
        seed: int,
        scale: Annotated[int, Field(ge=1, le=16)] = 3,
        patch: Pixels = 17,
        stride: Pixels = 13,
        batch_size: Samples = 16,
        learning_rate: Rate = 1e-3,
        lr_drop: Fraction = 0.8,
        train_folder: str = "t91",
        test_folder: str = "set5",
        further_test_folders: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.initial_rate = learning_rate
        self.drop_epoch = max(1, round(lr_drop * limits.epochs))
        with seeded(seed, "network"):
            # channels last: faster on a CPU
            self.network: ESPCN = ESPCN(scale).to(memory_format=torch.channels_last)

        train, test, self.marks = _images(data, train_folder, test_folder)
        self.dataset = {"train": _checksum(train), "test": _checksum(test)}
        if data.source == "real":
            self.marks += [
                f"{kind} images: not those of {name}"
                for kind, name in (("train", "the published 91-image set"), ("test", "the published Set5"))
                if self.dataset[kind] != PUBLISHED[kind]
            ]
        training, apart = (rows.tolist() for rows in kept_apart(len(train), data.validation))
        self.validation_images = ImagePairs([train[row] for row in apart], scale, smallest=patch)
        self.marks += [f"{len(apart)} of {len(train)} training images kept apart for choices"] if apart else []
        low, high = ImagePairs([train[row] for row in training], scale, smallest=patch).patches(patch, stride)
        rows, batch, marks = training_part(len(low), batch_size, limits)
        test_rows, test_marks = part("test set", len(test), limits.test_samples)
        self.marks += marks + test_marks
        self.train_batches = TensorBatches(low[rows], high[rows], batch_size=batch, seed=seed)
        self.test_images = ImagePairs([test[row] for row in test_rows.tolist()], scale, smallest=patch)
        self.further_tests = nn.ModuleDict()
        for name, images in _further(data, further_test_folders):
            self.further_tests[name] = ImagePairs(images, scale, smallest=patch)
            self.dataset[f"test {name}"] = _checksum(images)
        self.register_buffer("example", torch.zeros(1, 1, patch, patch), persistent=False)
        self.register_buffer("size_example", torch.zeros(1, 1, *SIZE_COUNTED_AT), persistent=False)

    def learning_rate(self, epoch: int) -> float:
        """Return the rate of `epoch`: the initial one, and a tenth of it from the drop on."""
        return self.initial_rate * 0.1 ** (epoch // self.drop_epoch)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Build Adam on all parameters."""
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.initial_rate, fused=True)
        return {"adam": self.optimizer}

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate of `epoch`."""
        set_learning_rate(self.learning_rate(epoch), self.optimizer)

    def train_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Take a step of Adam on the mean squared error of patches (B, 1, h, w) -> (B, 1, scale * h, scale * w)."""
        low, high = batch
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(self.network(low).float(), high)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def evaluate(self) -> dict[str, float]:
        """Return the mean PSNR in dB over whole images: of the test set, further ones, and those kept apart."""
        sets = {self.metric: self.test_images, f"{VALIDATION}{self.metric}": self.validation_images}
        further = {f"{self.metric}_{name}": pairs for name, pairs in self.further_tests.items()}
        with evaluating(self.network):
            return {n: self._psnr_db(p) for n, p in (sets | further).items() if isinstance(p, ImagePairs) and len(p)}

    def _psnr_db(self, pairs: ImagePairs) -> float:
        return torch.stack([psnr_db(self.network(low), high) for low, high in pairs]).mean().item()

    @torch.no_grad()
    def pictures(self) -> dict[str, Tensor]:
        """Return a grid with a row per test image, its centre: bicubic interpolation, output, original."""
        rows = []
        for low, high in self.test_images:
            bicubic = F.interpolate(low, size=high.shape[-2:], mode="bicubic", align_corners=False)
            rows += [center_crop(picture[0], [SHOWN, SHOWN]) for picture in (bicubic, self.network(low).float(), high)]
        grid = make_grid(torch.stack(rows).clamp(0, 1), nrow=3, pad_value=1.0)
        return {"test": grid.mul(255).round().to(torch.uint8)}

    def density(self, score: float, size_bits: float) -> float:
        """Return dB per natural logarithm of Mb (10^6 bits), for sizes above 1 Mb, where it is positive."""
        return score / math.log(size_bits / 1e6)


def _images(
    data: DataOptions, train_folder: str, test_folder: str
) -> tuple[list[NamedImage], list[NamedImage], list[str]]:
    """Read training images, test images and marks."""
    root = real_root(data, f"{train_folder} and {test_folder}")
    if root is None:
        return textured_pictures(32, part="train"), textured_pictures(5, part="test"), ["synthetic data"]
    train = read_images(root / train_folder, "task.train_folder")
    return train, read_images(root / test_folder, "task.test_folder"), []


def _further(data: DataOptions, folders: Sequence[str]) -> list[tuple[str, list[NamedImage]]]:
    """Read name and images of each further test set."""
    if folders and (data.source != "real" or data.root is None):
        raise UserError(
            f"task.further_test_folders={list(folders)} needs files: set data=real and data.root=FOLDER, or leave it []"
        )
    found = [
        (Path(name).name, read_images(Path(data.root or "", name), "task.further_test_folders")) for name in folders
    ]
    if len({name for name, _ in found}) < len(found) or any("." in name for name, _ in found):
        raise UserError(
            f"task.further_test_folders={list(folders)}: the folders' own names must differ and hold no dot; rename one"
        )
    return found


def _checksum(images: list[NamedImage]) -> str:
    return checksum(np.asarray(image) for _, image in images)
