"""What is asked of pruning and quantization: the config sections `prune` and `quantize` as checked values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qprune.compression.functional import integer_range
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer
from qprune.errors import UserError, one_of

TARGETS = ("w", "f", "wf")
WEIGHT_AXES = ("authors", "tensor", "output")


@dataclass(frozen=True)
class Pruning:
    """sparsity: final fraction of zeros. targets: `w`, `f` or `wf` (weights, features, both). window: T in samples.

    granularity, rule and border as in `Pruner`; granularity applies to features, weights are always unstructured.
    """

    sparsity: float = 0.5
    targets: str = "wf"
    window: int = 16
    granularity: str = "element"
    rule: str = "exact"
    border: str = "tile"

    def __post_init__(self) -> None:
        one_of("prune.targets", self.targets, TARGETS)
        if not isinstance(self.window, int) or self.window < 1:
            raise UserError(f"prune.window={self.window} is not a number of samples; type a whole number >= 1")
        self.for_features()  # the constructor checks the rest

    def for_features(self) -> Pruner:
        """A new pruner for a feature map."""
        return Pruner(self.sparsity, self.granularity, self.rule, self.border)

    def for_weights(self) -> Pruner:
        """A new pruner for a weight."""
        return Pruner(self.sparsity, "element", self.rule)


@dataclass(frozen=True)
class Quantization:
    """bits: of weights, and of features unless feature_bits says otherwise. targets: `w`, `f` or `wf`.

    saturate: quantiles of Eq. 6, for features; weights are never saturated (spec 3.2). decimal: a fixed d for all, or
    None for d*. weight_axis: which dimension of a weight has decimal bits of its own (spec 1.4): `authors` (dimension
    1 of a convolution, the kernel's width for a transposed one, none for a linear layer), `tensor` (none) or `output`
    (output channels). rounding and gradient as in `quantize`.
    """

    bits: int = 8
    feature_bits: int | None = None
    targets: str = "wf"
    rounding: str = "trunc"
    gradient: str = "clip_value"
    saturate: Sequence[float] = (0.0, 1.0)
    weight_axis: str = "authors"
    decimal: int | None = None

    def __post_init__(self) -> None:
        one_of("quantize.targets", self.targets, TARGETS)
        one_of("quantize.weight_axis", self.weight_axis, WEIGHT_AXES)
        integer_range(self.bits)
        self.for_features()

    @property
    def bits_of_features(self) -> int:
        """Bits of a feature element."""
        return self.bits if self.feature_bits is None else self.feature_bits

    def for_features(self) -> Quantizer:
        """A new quantizer for a feature map."""
        return Quantizer(self.bits_of_features, self.decimal, self.rounding, self.gradient, self.saturate)

    def for_weights(self, layer: nn.Module, name: str = "weight") -> Quantizer:
        """A new quantizer for the weight of `layer`, or for the parameter that it calls `name`."""
        return Quantizer(self.bits, self.decimal, self.rounding, self.gradient, axis=self.axis_of(layer, name))

    def axis_of(self, layer: nn.Module, name: str = "weight") -> int | None:
        """The dimension of the layer's weight with decimal bits of its own, or None."""
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        if self.weight_axis == "tensor" or not hasattr(layer, name):
            return None
        if self.weight_axis == "output":
            return 1 if transposed else 0
        if isinstance(layer, nn.modules.conv._ConvNd):
            return 3 if isinstance(layer, nn.ConvTranspose2d) else 1
        return None
