"""Unstructured, channel-wise and tiled pruning with a fixed mask (Eq. 3, 4 and 8)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qprune.compression.functional import MASK_RULES, check_sparsity, exact, magnitude_mask, prune
from qprune.compression.operator import Operator
from qprune.errors import UserError, one_of

GRANULARITIES = ("element", "channel", "last")
_MANY = 1 << 30  # more tiles than a feature has
BORDERS = ("tile", "keep")


class Pruner(Operator):
    """Multiplies by a mask that events choose by magnitude.

    Args:
        sparsity: Final fraction of zeros, in [0, 1).
        granularity: `element`, one mask entry per element of a sample (C, H, W) or of a weight; `channel`, one per
            channel (C, 1, 1); or `last`, one per index of the last dimension, where the (B, T, C) of transformers has
            its channels.
        rule: As in `magnitude_mask`.
        keep_zeros: Whether elements of a weight that are zero when the pruner is placed stay zero from then on, for
            networks that are sparse already. They count as part of `sparsity`.
        border: What happens to the rim of a feature map that is larger than the mask learned in training (spec 2.5):
            `tile` continues the tiling, `keep` leaves the rim unpruned as the authors do.

    Attributes:
        mask: Buffer, float32 of 0 and 1 (a float mask multiplies faster than a bool one); empty until it is sized,
            and of ones until the first event.
        window: The sum of |x| per mask entry, float64 (features only).
        of_samples: Whether dimension 0 of the input holds samples, which share the mask; False for a weight.
    """

    mask: Tensor
    first_mask: Tensor

    def __init__(
        self,
        sparsity: float = 0.5,
        granularity: str = "element",
        rule: str = "exact",
        border: str = "tile",
        keep_zeros: bool = False,
    ) -> None:
        super().__init__()
        one_of("granularity", granularity, GRANULARITIES)
        one_of("rule", rule, MASK_RULES)
        one_of("border", border, BORDERS)
        self.sparsity, self.granularity, self.rule, self.border = check_sparsity(sparsity), granularity, rule, border
        self.of_samples, self.keep_zeros = True, keep_zeros
        self.register_buffer("mask", torch.empty(0))
        if keep_zeros:
            self.register_buffer("first_mask", torch.empty(0))

    @property
    def acts(self) -> bool:
        """Return whether it changes its input, from the first event on, or from the start to keep zeros."""
        return self.keep_zeros or super().acts

    def size_for_feature(self, x: Tensor) -> None:
        """Size the mask by one batch of features (B, C, ...)."""
        if self.mask.numel() == 0:
            # In the memory layout of one sample: in another one, the mask would be slow to multiply with.
            entries = x[0] if self.granularity == "element" else x[0].new_empty(self._per_channel(x))
            self.mask = torch.ones_like(entries, dtype=torch.float32)

    def size_for_weight(self, weight: Tensor) -> None:
        """Size the mask by a weight, which needs no window."""
        self.of_samples = False
        if self.mask.numel() == 0:
            self.mask = torch.ones_like(weight, dtype=torch.float32)
            if self.keep_zeros:
                self.mask = (weight != 0).float()
                self.first_mask = self.mask.clone()

    def clear_window(self) -> None:
        """Go on with a window of which another rank carries the sum."""
        self.window = None if self.window is None else torch.zeros_like(self.window)

    def _per_channel(self, x: Tensor) -> tuple[int, ...]:
        if self.granularity == "last":
            return (*[1] * (x.dim() - 2), x.shape[-1])
        return (x.shape[1], *[1] * (x.dim() - 2))

    def observe(self, x: Tensor) -> None:
        """Add |x| of this call's samples (B, C, ...) to `window`, the running form of that of Eq. 8."""
        x = self.in_window(x)
        magnitude = x.abs()
        if self.granularity != "element" and magnitude.dim() > 2:
            rest = range(2, magnitude.dim()) if self.granularity == "channel" else range(1, magnitude.dim() - 1)
            magnitude = magnitude.mean(dim=tuple(rest), keepdim=True, dtype=torch.float64)
        if magnitude.shape[1:] != self.mask.shape:
            raise UserError(
                f"a feature map of shape {tuple(x.shape[1:])} reached a pruner that was sized for "
                f"{tuple(self.mask.shape)}: training features must keep one size; use granularity='channel', or "
                "granularity='last' where channels come last"
            )
        total = magnitude.sum(0, dtype=torch.float64)
        self.window = total if self.window is None else self.window + total

    def update(self, score: Tensor, fraction: float | Fraction) -> None:
        """A pruning event: choose the mask at `fraction` of the final sparsity by `score` (|w| or the window's sum)."""
        # In place, for references to the buffer, such as a captured graph's.
        if self.keep_zeros:
            score = torch.where(self.first_mask > 0, score, -1.0)  # below all magnitudes
        self.mask.copy_(magnitude_mask(score, exact(self.sparsity) * exact(fraction), self.rule))
        if self.keep_zeros:
            self.mask.mul_(self.first_mask)
        self.updates += 1

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, C, ...) or a weight, times the mask while active; observe it first while a window is open."""
        mask = self.mask_for(x)
        return x if mask is None else prune(x, mask)

    def mask_for(self, x: Tensor) -> Tensor | None:
        """Observe x while a window is open; return the mask that fits x, or None while inactive."""
        if self.collecting:
            self.observe(x)
        return None if self.active is False and not self.keep_zeros else self.fitted(x)

    def fitted(self, x: Tensor) -> Tensor:
        """Return the mask, tiled to x's size where x is a feature of another size than those of training."""
        mask = self._nearest() if self.averaged else self.mask
        if self.granularity != "element" or not self.of_samples or x.shape[1:] == mask.shape or not mask.numel():
            return mask if mask.numel() else mask.new_ones(())
        if x.shape[1] != mask.shape[0]:  # channels last, as in (B, T, C): nothing can be tiled
            raise UserError(
                f"a feature of shape {tuple(x.shape[1:])} reached a pruner with a mask of {tuple(mask.shape)}; "
                "give all inputs one size (pad sequences), or use granularity='last'"
            )
        return tile_mask(mask, tuple(x.shape[2:]), self.border)

    def _nearest(self) -> Tensor:
        """Return the mask, of averaged values the nearer of 0 and 1."""
        return (self.mask > 0.5).to(self.mask.dtype)

    @torch.no_grad()
    def settle(self) -> None:
        """Replace averages in buffers by the values that they stand for."""
        super().settle()
        self.mask.copy_(self._nearest())

    @property
    def density(self) -> float:
        """Fraction of ones in the mask; 1 before it is sized."""
        return float(self._nearest().mean(dtype=torch.float64)) if self.mask.numel() else 1.0

    @property
    def facts(self) -> dict[str, Any]:
        """The fraction of ones and the number of entries of the mask."""
        return {"density": self.density, "mask": self.mask.numel()}

    def extra_repr(self) -> str:
        return f"sparsity={self.sparsity}, {self.granularity}, mask={tuple(self.mask.shape)}, active={self.active}"


def tile_mask(mask: Tensor, size: tuple[int, ...], border: str = "tile") -> Tensor:
    """Tile a mask (C, h, w) over a feature map of `size` (H, W), whole tiles in the centre (spec 2.5).

    Border `tile` continues the pattern beyond them, and takes the mask's centre where the map is smaller; `keep`
    leaves everything beyond whole tiles unpruned, so that a map smaller than the mask is not pruned.
    """
    sizes, dims = mask.shape, len(size) + 1
    for dim, length in enumerate(size, start=1):
        tile, repeats = sizes[dim], [1] * dims
        # No branch on a size, for torch.fx and torch.export; no quotient of a negative number, which ONNX rounds up.
        whole = length // tile
        if border == "keep":
            repeats[dim] = whole
            before = (length - whole * tile) // 2
            inner = [0] * (2 * (dims - 1 - dim))
            mask = F.pad(mask.repeat(repeats), [*inner, before, length - whole * tile - before], value=1.0)
        else:
            at_least_one = whole + 1 - (whole + _MANY - 1) // _MANY  # as `max`, which torch.jit.trace does not take
            offset = (length - at_least_one * tile + 2 * tile) // 2 - tile
            repeats[dim] = whole + 2
            mask = mask.repeat(repeats).narrow(dim, (0 - offset) % tile, length)
    return mask
