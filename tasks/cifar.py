"""Image classification on CIFAR-10 with MobileNetV2 (Appendix B.1)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qprune.config.types import Momentum, Rate, Samples, Weight
from qprune.tasks.data.augment import CropAndFlip
from qprune.tasks.data.batches import TensorBatches
from qprune.tasks.data.checksum import checksum
from qprune.tasks.data.cifar10 import ClassifiedPictures, load_cifar10
from qprune.tasks.data.parts import kept_apart, part, spread, training_part
from qprune.tasks.data.seeds import seeded
from qprune.tasks.data.source import real_root
from qprune.tasks.data.synthetic import classified_gratings
from qprune.tasks.models.initialisation import xavier_
from qprune.tasks.models.mobilenetv2 import MobileNetV2
from qprune.tasks.models.modes import evaluating
from qprune.tasks.optimizers import set_learning_rate
from qprune.training.task import VALIDATION, DataOptions, Limits, Task

MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's red, green and blue
STD = (0.2023, 0.1994, 0.2010)


class Cifar(Task):
    """Train MobileNetV2 on CIFAR-10. Score: top-1 accuracy in percent; density: percent per Mb.

    Args:
        data: Where the pictures come from.
        limits: How much of the recipe is run. Where it caps the batch, the learning rate shrinks in proportion: at 32
            samples, 0.1 diverges in the few steps of such a budget.
        seed: Of weights, order and augmentation.
        batch_size: Samples per training step.
        eval_batch_size: Test pictures per forward pass; no effect on the score.
        learning_rate: Of the first epoch, falling to 0 along half a cosine.
        momentum: Of SGD.
        weight_decay: Of SGD, for all parameters.
        initialization: `default` (PyTorch's) or `xavier`, which the paper's Table 1 names (Glorot and Bengio 2010).

    Raises:
        UserError: The data is not usable.
    """

    metric = "top1_percent"
    higher_is_better = True
    validates = True
    density_unit = "%/Mb"
    train_batches: TensorBatches
    mean: Tensor
    std: Tensor
    test_images: Tensor
    test_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    optimizer: torch.optim.SGD

    def __init__(
        self,
        *,
        data: DataOptions,
        limits: Limits,
        seed: int,
        batch_size: Samples = 128,
        eval_batch_size: Samples = 100,
        learning_rate: Rate = 0.1,
        momentum: Momentum = 0.9,
        weight_decay: Weight = 5e-4,
        initialization: Literal["default", "xavier"] = "default",
    ) -> None:
        super().__init__()
        self.epochs = limits.epochs
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.eval_batch_size = eval_batch_size
        with seeded(seed, "network"):
            # channels last: faster on a CPU, and what tensor cores want
            self.network: MobileNetV2 = MobileNetV2().to(memory_format=torch.channels_last)
            if initialization == "xavier":
                xavier_(self.network)

        pictures, self.marks = _pictures(data)
        self.dataset = {
            "train": checksum((pictures.train_images.numpy(), pictures.train_labels.numpy())),
            "test": checksum((pictures.test_images.numpy(), pictures.test_labels.numpy())),
        }
        training, apart = kept_apart(len(pictures.train_labels), data.validation)
        if len(apart):
            self.marks.append(f"{len(apart)} of {len(pictures.train_labels)} training pictures kept apart for choices")
        rows, batch, marks = training_part(len(training), batch_size, limits)
        rows = training[rows]
        test_rows, test_marks = part("test set", len(pictures.test_labels), limits.test_samples)
        apart = apart[spread(len(apart), limits.test_samples)]
        self.marks += marks + test_marks
        self.initial_rate = learning_rate * batch / batch_size
        self.train_batches = TensorBatches(
            pictures.train_images[rows],
            pictures.train_labels[rows],
            batch_size=batch,
            seed=seed,
            augmentation=CropAndFlip(size=32, side=32, padding=4),
        )
        example = torch.zeros(1, 3, 32, 32)
        self._hold(test_images=pictures.test_images[test_rows], test_labels=pictures.test_labels[test_rows])
        self._hold(validation_images=pictures.train_images[apart], validation_labels=pictures.train_labels[apart])
        self._hold(mean=torch.tensor(MEAN)[:, None, None], std=torch.tensor(STD)[:, None, None])
        self._hold(example=example, size_example=example.clone())

    def _hold(self, **tensors: Tensor) -> None:
        """Register tensors as buffers outside the state dict."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def normalised(self, pictures: Tensor) -> Tensor:
        """Convert pictures (N, 3, 32, 32) in uint8 to the network's input in float32."""
        return pictures.float().div(255).sub(self.mean).div(self.std)

    def learning_rate(self, epoch: int) -> float:
        """Return the rate of `epoch`: half a cosine from the initial rate to 0, constant within an epoch."""
        return 0.5 * self.initial_rate * (1 + math.cos(math.pi * epoch / self.epochs))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Build SGD with momentum and weight decay on all parameters, those of batch norms included."""
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=self.initial_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        return {"sgd": self.optimizer}

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate of `epoch`."""
        set_learning_rate(self.learning_rate(epoch), self.optimizer)

    def train_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Take a step of SGD on the cross entropy of pictures (B, 3, 32, 32) in uint8 and labels (B,)."""
        pictures, labels = batch
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.network(self.normalised(pictures)), labels)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def evaluate(self) -> dict[str, float]:
        """Return top-1 accuracy in percent and mean cross entropy, of the test set and of pictures kept apart."""
        with evaluating(self.network):
            accuracy, loss = self._scores(self.test_images, self.test_labels)
            found = {self.metric: accuracy, "test_loss": loss}
            if len(self.validation_labels):
                accuracy, loss = self._scores(self.validation_images, self.validation_labels)
                found |= {f"{VALIDATION}{self.metric}": accuracy, f"{VALIDATION}loss": loss}
        return found

    def _scores(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Return accuracy in percent and mean cross entropy; sums stay on the device until the end."""
        right = torch.zeros((), dtype=torch.int64, device=labels.device)
        loss = torch.zeros((), device=labels.device)
        for pictures, classes in zip(
            images.split(self.eval_batch_size), labels.split(self.eval_batch_size), strict=True
        ):
            logits = self.network(self.normalised(pictures)).float()
            right += (logits.argmax(dim=1) == classes).sum()
            loss += F.cross_entropy(logits, classes, reduction="sum")
        return 100 * right.item() / len(labels), loss.item() / len(labels)

    def density(self, score: float, size_bits: float) -> float:
        """Return percent per Mb, with 1 Mb = 10^6 bits."""
        return score / (size_bits / 1e6)


def _pictures(data: DataOptions) -> tuple[ClassifiedPictures, list[str]]:
    root = real_root(data, "cifar-10-batches-py")
    if root is None:
        return classified_gratings(), ["synthetic data"]
    return load_cifar10(root, data.verify, data.fetch)
