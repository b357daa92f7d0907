"""Facades from label maps with Pix2Pix: a U-Net against a PatchGAN, on pairs (Appendix B.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.utils import make_grid

from qprune.config.types import Channels, Fraction, Momentum, Pixels, Rate, Samples, Weight
from qprune.errors import UserError, one_of
from qprune.tasks.data.augment import CropAndFlip
from qprune.tasks.data.batches import TensorBatches
from qprune.tasks.data.checksum import checksum, unpacked
from qprune.tasks.data.facades import DIRECTIONS, read_pairs
from qprune.tasks.data.parts import part, training_part
from qprune.tasks.data.seeds import seeded
from qprune.tasks.data.source import real_root
from qprune.tasks.data.synthetic_translation import TEST, TRAIN, label_maps_and_pictures
from qprune.tasks.data.translation import SIZE, SMALL, enlarged, in_bytes, is_trial, other_than, signed
from qprune.tasks.metrics.fid import distance_of
from qprune.tasks.models.adversarial import logistic_loss
from qprune.tasks.models.initialisation import gaussian_
from qprune.tasks.models.modes import frozen, generating
from qprune.tasks.models.patchgan import PatchGAN
from qprune.tasks.models.unet import UNet
from qprune.tasks.optimizers import adam, constant_then_linear, set_learning_rate
from qprune.training.task import DataOptions, Limits, Task

PUBLISHED = {"training": 400, "test": 106}  # pairs of the published facades
WIDTH, TRIAL_WIDTH = 64, 32
SHOWN = 8  # test pictures in the saved grid


class Pix2Pix(Task):
    """Train Pix2Pix. Score: FID of generated test pictures against their targets; density: 1e12 / (FID * bits).

    Sizes that are None are the paper's, or small ones for synthetic data in shortened epochs.

    Args:
        data: Where the pairs come from.
        limits: How much of the recipe is run.
        seed: Of weights, order, crops and dropout.
        image_size: Side in pixels, a multiple of 2**depth; training pictures are cut from ones 286/256 as large.
        depth: Halvings of the U-Net.
        width: Channels of the first layer of both networks.
        dropout: Of the U-Net's inner stages.
        extra_norm: The batch norm that the authors added to the first layer; the accounting `paper` always counts it.
        batch_size: Pairs per training step.
        l1_weight: Of the L1 loss beside the adversarial one.
        learning_rate: Of Adam, constant for two thirds of the epochs, then falling linearly.
        beta1: Of Adam.
        direction: `AtoB` or `BtoA`.
        test_like_training: Make test pictures with dropout and the picture's own statistics, as the authors do.
        fid: `inception`, `proxy`, or `auto`: `inception` for the whole recipe on real data, else `proxy`.
        inception_weights: File of FID's network, see `FrechetDistance`.
        train_folder: Folder of training pairs, below data.root.
        test_folder: Folder of test pairs.

    Raises:
        UserError: The data or an option is not usable.
    """

    higher_is_better = False
    density_unit = "1e12/(FID x bits)"
    train_batches: TensorBatches
    example: Tensor
    size_example: Tensor
    test_pairs: Tensor
    generator_optimizer: torch.optim.Adam
    judge_optimizer: torch.optim.Adam

    def __init__(
        self,
        *,
        data: DataOptions,
        limits: Limits,
        seed: int,
        image_size: Pixels | None = None,
        depth: Annotated[int, Field(ge=3, le=14)] | None = None,
        width: Channels | None = None,
        dropout: Fraction = 0.5,
        extra_norm: bool = False,
        batch_size: Samples = 1,
        l1_weight: Weight = 100.0,
        learning_rate: Rate = 2e-4,
        beta1: Momentum = 0.5,
        direction: str = "BtoA",
        test_like_training: bool = True,
        fid: str = "auto",
        inception_weights: str | None = None,
        train_folder: str = "facades/train",
        test_folder: str = "facades/test",
    ) -> None:
        super().__init__()
        one_of("task.direction", direction, DIRECTIONS)
        trial = is_trial(data, limits)
        size = image_size or (SMALL if trial else SIZE)
        self.width = width or (TRIAL_WIDTH if trial else WIDTH)
        self.depth = depth or min(8, (size & -size).bit_length() - 1)  # down to one pixel for a power of 2
        if size % 2**self.depth:
            raise UserError(
                f"task.image_size={size} cannot be halved {self.depth} times; type a multiple of {2**self.depth}"
            )
        self.epochs, self.l1_weight, self.extra_norm = limits.epochs, l1_weight, extra_norm
        self.rate, self.beta1, self.test_like_training = learning_rate, beta1, test_like_training
        # not a child module, so that its network stays out of checkpoints
        self.distance = distance_of(fid, inception_weights, data, limits)
        self.metric = self.distance.name
        with seeded(seed, "network"):
            self.network = UNet(self.depth, self.width, dropout, extra_norm)
            self.judge = PatchGAN(6, self.width)
            gaussian_(self.network)
            gaussian_(self.judge)

        train, test, self.marks = _pairs(data, Path(train_folder), Path(test_folder), size, direction)
        self.dataset = {"train": checksum([train.numpy()]), "test": checksum([test.numpy()])}
        if data.source == "real":
            self.dataset |= unpacked(*(Path(data.root or "", folder) for folder in (train_folder, test_folder)))
        rows, batch, marks = training_part(len(train), batch_size, limits)
        test_rows, test_marks = part("test set", len(test), limits.test_samples)
        self.marks += [
            *marks,
            *test_marks,
            *other_than("image size", size, SIZE),
            *other_than("width", self.width, WIDTH),
        ]
        self.train_batches = TensorBatches(
            train[rows], rows, batch_size=batch, seed=seed, augmentation=CropAndFlip(size, train.shape[-1])
        )
        self.register_buffer("test_pairs", test[test_rows], persistent=False)
        self.register_buffer("example", torch.zeros(1, 3, size, size), persistent=False)
        self.register_buffer("size_example", torch.zeros(1, 3, size, size), persistent=False)

    @property
    def paper_network(self) -> nn.Module:
        """The U-Net with the authors' extra norm, which the paper's sizes include."""
        if self.extra_norm:
            return self.network
        with torch.random.fork_rng(devices=[]):
            return UNet(self.depth, self.width, extra_norm=True).to(self.size_example.device)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Build Adam for the generator and for the discriminator."""
        self.generator_optimizer = adam([self.network], self.rate, self.beta1)
        self.judge_optimizer = adam([self.judge], self.rate, self.beta1)
        return {"generator": self.generator_optimizer, "judge": self.judge_optimizer}

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate of `epoch`."""
        rate = self.rate * constant_then_linear(epoch, self.epochs)
        set_learning_rate(rate, self.generator_optimizer, self.judge_optimizer)

    def train_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Train the discriminator, then the generator, on pairs (B, 6, S, S) in uint8: input, then target."""
        source, target = signed(batch[0]).chunk(2, dim=1)
        made = self.network(source)

        self.judge_optimizer.zero_grad(set_to_none=True)
        on_made = logistic_loss(self.judge(torch.cat((source, made.detach()), dim=1)), real=False)
        on_real = logistic_loss(self.judge(torch.cat((source, target), dim=1)), real=True)
        judging = (on_made + on_real) / 2
        judging.backward()
        self.judge_optimizer.step()

        self.generator_optimizer.zero_grad(set_to_none=True)
        with frozen(self.judge):
            deceiving = logistic_loss(self.judge(torch.cat((source, made), dim=1)), real=True)
        l1 = F.l1_loss(made.float(), target)
        (deceiving + self.l1_weight * l1).backward()
        self.generator_optimizer.step()
        return {"generator": deceiving.detach(), "l1": l1.detach(), "judge": judging.detach()}

    def _made(self, sources: Tensor) -> Tensor:
        """Generate pictures (N, 3, S, S) in uint8, one at a time: norms may use the picture's own statistics."""
        with generating(self.network, like_training=self.test_like_training):
            return torch.cat([in_bytes(self.network(signed(source))) for source in sources.split(1)])

    def evaluate(self) -> dict[str, float]:
        """Return the distance of generated pictures to the targets, and `l1`, the mean error of a pixel in 0..2."""
        sources, targets = self.test_pairs.chunk(2, dim=1)
        made = self._made(sources)
        l1 = (signed(made) - signed(targets)).abs().mean().item()
        return {self.metric: self.distance(targets, made), "l1": l1}

    def pictures(self) -> dict[str, Tensor]:
        """Return a grid with a row per test pair: input, generated picture, target."""
        sources, targets = self.test_pairs[:SHOWN].chunk(2, dim=1)
        rows = torch.stack((sources, self._made(sources), targets), dim=1)
        return {"test": make_grid(rows.flatten(0, 1), nrow=3)}

    def density(self, score: float, size_bits: float) -> float:
        """Return 10^12 / (score * bits), with scores of at least 0.01: random features may find two sets alike."""
        return 1e12 / (max(score, 0.01) * size_bits)


def _pairs(
    data: DataOptions, train_folder: Path, test_folder: Path, size: int, direction: str
) -> tuple[Tensor, Tensor, list[str]]:
    """Read training pairs (N, 6, L, L), L larger than size, test pairs (M, 6, size, size), and marks."""
    root = real_root(data, f"{train_folder} and {test_folder}")
    if root is None:
        train = label_maps_and_pictures(TRAIN, enlarged(size), "train")
        return train, label_maps_and_pictures(TEST, size, "test"), ["synthetic data"]
    train = read_pairs(root / train_folder, "task.train_folder", enlarged(size), direction)
    test = read_pairs(root / test_folder, "task.test_folder", size, direction)
    marks = [
        f"{kind} set: {len(pairs)} pairs, the published one has {PUBLISHED[kind]}"
        for kind, pairs in (("training", train), ("test", test))
        if len(pairs) != PUBLISHED[kind]
    ]
    return train, test, marks
