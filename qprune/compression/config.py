"""What pruning and quantization are to do: the config sections `prune` and `quantize` as checked values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qprune.compression.functional import check_saturate, integer_range
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import AUTHORS_DECIMALS, Quantizer
from qprune.errors import UserError, one_of

TARGETS = ("w", "f", "wf")
WEIGHT_AXES = ("authors", "tensor", "output")
CANDIDATES = ("any", "authors")
OBJECTIVES = ("saturated", "literal")
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_OF_TORCH = (*CONVOLUTIONS, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.Embedding)  # output channels are known


@dataclass(frozen=True)
class PruneConfig:
    """How much is pruned, of what, and by which rule.

    Args:
        sparsity: Final fraction of zeros, in [0, 1).
        targets: `w`, `f` or `wf`: weights, features, both.
        window: T, samples that are observed before each event.
        granularity: Of features, as in `Pruner`; weights are pruned element by element.
        rule, border, keep_zeros: As in `Pruner`.

    Raises:
        UserError: A value is not legal.
    """

    sparsity: float = 0.5
    targets: str = "wf"
    window: int = 16
    granularity: str = "element"
    rule: str = "exact"
    border: str = "tile"
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        one_of("targets", self.targets, TARGETS)
        if not isinstance(self.window, int) or self.window < 1:
            raise UserError(f"window={self.window} is not a number of samples; type a whole number >= 1")
        self.for_features()  # the constructor checks the rest

    def for_features(self) -> Pruner:
        """Build a pruner for a feature map."""
        return Pruner(self.sparsity, self.granularity, self.rule, self.border)

    def for_weights(self) -> Pruner:
        """Build a pruner for a weight."""
        return Pruner(self.sparsity, "element", self.rule, keep_zeros=self.keep_zeros)


@dataclass(frozen=True)
class QuantizeConfig:
    """To how many bits weights and features are quantized, and how.

    Args:
        bits: N of weights, and of features unless `feature_bits` is given; from 2 to 16.
        feature_bits: N of features.
        targets: `w`, `f` or `wf`: weights, features, both.
        rounding, gradient: As in `fake_quantize`.
        saturate: Quantiles of Eq. 6, for features; weights are never saturated (spec 3.2).
        weight_axis: The dimension of a weight with fraction bits of its own (spec 1.4): `authors` (dimension 1 of a
            convolution, the kernel's width of a transposed one, none of a linear layer), `tensor` (none) or `output`
            (output channels).
        decimal: A fixed d for all, or None for d*.
        candidates: Of which d* is chosen: `any`, those that suit the scale of each tensor; or `authors`, 0 to 19, under
            which magnitudes above 2^(N-1) are cut off.
        objective: What d* minimizes where features saturate: the error of Q(S(x)) (`saturated`, the authors' code), or
            of Q(x) (`literal`, Eq. 7 as printed), each against S(x).

    Raises:
        UserError: A value is not legal.
    """

    bits: int = 8
    feature_bits: int | None = None
    targets: str = "wf"
    rounding: str = "trunc"
    gradient: str = "clip_value"
    saturate: Sequence[float] = (0.0, 1.0)
    weight_axis: str = "authors"
    decimal: int | None = None
    candidates: str = "any"
    objective: str = "saturated"

    def __post_init__(self) -> None:
        one_of("candidates", self.candidates, CANDIDATES)
        one_of("objective", self.objective, OBJECTIVES)
        one_of("targets", self.targets, TARGETS)
        one_of("weight_axis", self.weight_axis, WEIGHT_AXES)
        integer_range(self.bits)
        self.for_features()

    @property
    def bits_of_features(self) -> int:
        """Bits of a feature element."""
        return self.bits if self.feature_bits is None else self.feature_bits

    def for_features(self) -> Quantizer:
        """Build a quantizer for a feature map."""
        saturate = check_saturate(self.saturate)._replace(literal=self.objective == "literal")
        return Quantizer(self.bits_of_features, self._decimal, self.rounding, self.gradient, saturate)

    def for_weights(self, layer: nn.Module, name: str = "weight") -> Quantizer:
        """Build a quantizer for the parameter `name` of `layer`."""
        return Quantizer(self.bits, self._decimal, self.rounding, self.gradient, axis=self.axis_of(layer, name))

    @property
    def _decimal(self) -> int | Sequence[int] | None:
        return AUTHORS_DECIMALS if self.decimal is None and self.candidates == "authors" else self.decimal

    def axis_of(self, layer: nn.Module, name: str = "weight") -> int | None:
        """Return the dimension of a parameter with fraction bits of its own, or None."""
        transposed = isinstance(layer, TRANSPOSED)
        if self.weight_axis == "tensor" or not hasattr(layer, name):
            return None
        if self.weight_axis == "output":
            return int(transposed) if isinstance(layer, _OF_TORCH) else None
        if isinstance(layer, CONVOLUTIONS):
            return 3 if isinstance(layer, nn.ConvTranspose2d) else 1
        return None


def is_target(kind: str, options: PruneConfig | QuantizeConfig | None) -> bool:
    """Return whether a config acts on `weight` or `feature` tensors; None acts on none."""
    return options is not None and kind[0] in options.targets
