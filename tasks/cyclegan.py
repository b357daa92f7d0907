"""Zebras from horses with CycleGAN: two generators and two discriminators, on unpaired pictures (Appendix B.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.utils import make_grid

from qprune.config.types import Channels, Momentum, Pixels, Rate, Samples, Weight
from qprune.errors import UserError
from qprune.tasks.data.augment import CropAndFlip
from qprune.tasks.data.checksum import checksum, unpacked
from qprune.tasks.data.image_pool import ImagePool
from qprune.tasks.data.parts import part, spread, training_part
from qprune.tasks.data.seeds import seeded
from qprune.tasks.data.source import real_root
from qprune.tasks.data.synthetic_translation import TEST, TRAIN, plain_or_striped
from qprune.tasks.data.translation import SIZE, SMALL, enlarged, in_bytes, is_trial, other_than, signed
from qprune.tasks.data.unpaired import UnpairedBatches, read_domain
from qprune.tasks.metrics.fid import distance_of
from qprune.tasks.models.adversarial import square_loss
from qprune.tasks.models.initialisation import gaussian_
from qprune.tasks.models.modes import frozen, generating
from qprune.tasks.models.patchgan import PatchGAN
from qprune.tasks.models.resnet_generator import ResnetGenerator
from qprune.tasks.optimizers import adam, constant_then_linear, set_learning_rate
from qprune.training.task import DataOptions, Limits, Task

PUBLISHED = {"trainA": 1067, "trainB": 1334, "testA": 120, "testB": 140}  # pictures of the published horse2zebra
WIDTH, TRIAL_WIDTH = 64, 16
SHOWN = 8  # test pictures in the saved grid


class CycleGAN(Task):
    """Train CycleGAN. Score: FID of all translated test pictures of A against those of B; density: 1e12 / (FID * bits).

    `network` translates A to B and is compressed; `back` translates B to A and is only trained. Sizes that are None are
    the paper's, or small ones for synthetic data in shortened epochs.

    Args:
        data: Where the pictures come from.
        limits: How much of the recipe is run.
        seed: Of weights, order, crops and pools.
        image_size: Side in pixels, a multiple of 4; training pictures are cut from ones 286/256 as large.
        blocks: Residual blocks of both generators.
        width: Channels of the first layer of all networks.
        norm: `instance` or `batch`, of all networks.
        batch_size: Pictures of each domain per training step.
        cycle_weight: Of the cycle loss, in both directions.
        identity_weight: Of the identity loss, as a fraction of `cycle_weight`.
        pool_size: Earlier pictures in the pool of each discriminator.
        learning_rate: Of Adam, constant for two thirds of the epochs, then falling linearly.
        beta1: Of Adam.
        fid: `inception`, `proxy`, or `auto`: `inception` for the whole recipe on real data, else `proxy`.
        inception_weights: File of FID's network, see `FrechetDistance`.
        folder: Folder of trainA, trainB, testA and testB, below data.root.

    Raises:
        UserError: The data or an option is not usable.
    """

    higher_is_better = False
    density_unit = "1e12/(FID x bits)"
    train_batches: UnpairedBatches
    example: Tensor
    size_example: Tensor
    test_a: Tensor
    test_b: Tensor
    generator_optimizer: torch.optim.Adam
    judge_optimizer: torch.optim.Adam

    def __init__(
        self,
        *,
        data: DataOptions,
        limits: Limits,
        seed: int,
        image_size: Pixels | None = None,
        blocks: Annotated[int, Field(ge=1, le=100)] = 9,
        width: Channels | None = None,
        norm: Literal["instance", "batch"] = "instance",
        batch_size: Samples = 1,
        cycle_weight: Weight = 10.0,
        identity_weight: Weight = 0.5,
        pool_size: Annotated[int, Field(ge=0, le=10**6)] = 50,
        learning_rate: Rate = 2e-4,
        beta1: Momentum = 0.5,
        fid: str = "auto",
        inception_weights: str | None = None,
        folder: str = "horse2zebra",
    ) -> None:
        super().__init__()
        trial = is_trial(data, limits)
        size = image_size or (SMALL if trial else SIZE)
        self.width = width or (TRIAL_WIDTH if trial else WIDTH)
        if size % 4:
            raise UserError(f"task.image_size={size} cannot be halved twice; type a multiple of 4")
        self.epochs, self.blocks, self.norm = limits.epochs, blocks, norm
        self.cycle_weight, self.identity_weight = cycle_weight, identity_weight
        self.rate, self.beta1 = learning_rate, beta1
        # not a child module, so that its network stays out of checkpoints
        self.distance = distance_of(fid, inception_weights, data, limits)
        self.metric = self.distance.name
        with seeded(seed, "network"):
            self.network = ResnetGenerator(blocks, self.width, norm)
            self.back = ResnetGenerator(blocks, self.width, norm)
            self.judge_a = PatchGAN(3, self.width, norm)
            self.judge_b = PatchGAN(3, self.width, norm)
            for network in (self.network, self.back, self.judge_a, self.judge_b):
                gaussian_(network)
        self.pool_a, self.pool_b = ImagePool(pool_size), ImagePool(pool_size)

        sets, self.marks = _domains(data, Path(folder), size)
        self.dataset = {name: checksum([pictures.numpy()]) for name, pictures in sets.items()}
        if data.source == "real":
            self.dataset |= unpacked(*(Path(data.root or "", folder, name) for name in PUBLISHED))
        train_a, train_b = sets["trainA"], sets["trainB"]
        rows, batch, marks = training_part(max(len(train_a), len(train_b)), batch_size, limits)
        rows_a, rows_b = (spread(len(pictures), len(rows)) for pictures in (train_a, train_b))
        tests = [part(f"test set {name[-1]}", len(sets[name]), limits.test_samples) for name in ("testA", "testB")]
        self.marks += [*marks, *tests[0][1], *tests[1][1]]
        self.marks += [*other_than("image size", size, SIZE), *other_than("width", self.width, WIDTH)]
        self.train_batches = UnpairedBatches(
            train_a[rows_a],
            train_b[rows_b],
            batch_size=batch,
            seed=seed,
            augmentation=CropAndFlip(size, train_a.shape[-1]),
        )
        self.register_buffer("test_a", sets["testA"][tests[0][0]], persistent=False)
        self.register_buffer("test_b", sets["testB"][tests[1][0]], persistent=False)
        self.register_buffer("example", torch.zeros(1, 3, size, size), persistent=False)
        self.register_buffer("size_example", torch.zeros(1, 3, size, size), persistent=False)

    @property
    def paper_network(self) -> nn.Module:
        """The generator with batch norms: the paper's sizes are torchinfo's, which counts modules with parameters."""
        if self.norm == "batch":
            return self.network
        with torch.random.fork_rng(devices=[]):
            return ResnetGenerator(self.blocks, self.width, "batch").to(self.size_example.device)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Build one Adam for both generators, and one for both discriminators."""
        self.generator_optimizer = adam([self.network, self.back], self.rate, self.beta1)
        self.judge_optimizer = adam([self.judge_a, self.judge_b], self.rate, self.beta1)
        return {"generators": self.generator_optimizer, "judges": self.judge_optimizer}

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate of `epoch`."""
        rate = self.rate * constant_then_linear(epoch, self.epochs)
        set_learning_rate(rate, self.generator_optimizer, self.judge_optimizer)

    def train_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Train the generators, then the discriminators, on pictures of A and of B, (B, 3, S, S) in uint8."""
        real_a, real_b = signed(batch[0]), signed(batch[1])
        self.generator_optimizer.zero_grad(set_to_none=True)
        # each generator is called three times: compute its weights once, for one backward pass
        with frozen(self.judge_a, self.judge_b), parametrize.cached():
            made_b, made_a = self.network(real_a), self.back(real_b)
            deceiving = square_loss(self.judge_b(made_b), real=True) + square_loss(self.judge_a(made_a), real=True)
            cycle = _distance(self.back(made_b), real_a) + _distance(self.network(made_a), real_b)
            loss = deceiving + self.cycle_weight * cycle
            identity = torch.zeros_like(cycle)
            if self.identity_weight:
                identity = _distance(self.network(real_b), real_b) + _distance(self.back(real_a), real_a)
                loss = loss + self.cycle_weight * self.identity_weight * identity
            loss.backward()
        self.generator_optimizer.step()

        self.judge_optimizer.zero_grad(set_to_none=True)
        judging = self._judging(self.judge_b, real_b, self.pool_b.exchange(made_b))
        judging = judging + self._judging(self.judge_a, real_a, self.pool_a.exchange(made_a))
        judging.backward()
        self.judge_optimizer.step()
        losses = {"generators": deceiving, "cycle": cycle, "identity": identity, "judges": judging}
        return {name: value.detach() for name, value in losses.items()}

    def _judging(self, judge: nn.Module, real: Tensor, made: Tensor) -> Tensor:
        return (square_loss(judge(real), real=True) + square_loss(judge(made.detach()), real=False)) / 2

    def _translated(self, pictures: Tensor) -> Tensor:
        """Translate pictures (N, 3, S, S) of A in uint8 to B."""
        with generating(self.network):
            return torch.cat([in_bytes(self.network(signed(picture))) for picture in pictures.split(1)])

    def evaluate(self) -> dict[str, float]:
        """Return the distance of all translated test pictures of A to the test pictures of B."""
        return {self.metric: self.distance(self.test_b, self._translated(self.test_a))}

    def pictures(self) -> dict[str, Tensor]:
        """Return a grid with two test pictures of A per row, each followed by its translation."""
        sources = self.test_a[:SHOWN]
        return {"test": make_grid(torch.stack((sources, self._translated(sources)), dim=1).flatten(0, 1), nrow=4)}

    def density(self, score: float, size_bits: float) -> float:
        """Return 10^12 / (score * bits), with scores of at least 0.01: random features may find two sets alike."""
        return 1e12 / (max(score, 0.01) * size_bits)

    def memory(self) -> dict[str, Any]:
        """Return the pictures of both pools."""
        return {"pool_a": self.pool_a.contents(), "pool_b": self.pool_b.contents()}

    def restore_memory(self, memory: dict[str, Any]) -> None:
        """Refill the pools."""
        for name, pool in (("pool_a", self.pool_a), ("pool_b", self.pool_b)):
            pool.refill(memory[name], self.example.device)


def _distance(made: Tensor, wanted: Tensor) -> Tensor:
    return F.l1_loss(made.float(), wanted)


def _domains(data: DataOptions, folder: Path, size: int) -> tuple[dict[str, Tensor], list[str]]:
    """Read the four sets, (N, 3, L, L) for training, L larger than size, (N, 3, size, size) for testing, and marks."""
    root = real_root(data, str(folder))
    if root is None:
        train, test = plain_or_striped(TRAIN, enlarged(size), "train"), plain_or_striped(TEST, size, "test")
        return dict(zip(PUBLISHED, (*train, *test), strict=True)), ["synthetic data"]
    sets = {
        name: read_domain(root / folder / name, enlarged(size) if name.startswith("train") else size)
        for name in PUBLISHED
    }
    marks = [
        f"{name}: {len(sets[name])} pictures, the published set has {count}"
        for name, count in PUBLISHED.items()
        if len(sets[name]) != count
    ]
    return sets, marks
