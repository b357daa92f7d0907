"""The CIFAR-10 networks of Table 5: those that the paper counted, and those that the cited papers name.

Only shapes matter: elements are counted on torch's `meta` device, without weights or arithmetic.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.compression.footprint import paper_footprint


def elements(build: Callable[[], nn.Module]) -> tuple[int, int]:
    """Elements of weights and of features of a network in the paper's accounting, at 32x32 pixels."""
    with torch.device("meta"):
        network, example = build(), torch.zeros(1, 3, 32, 32)
    size = paper_footprint(network, example)
    return size.elements("weight"), size.elements("feature")


def conv(inside: int, out: int, kernel: int = 3, stride: int = 1, **options: object) -> nn.Conv2d:
    options = {"padding": kernel // 2, "bias": False} | options
    return nn.Conv2d(inside, out, kernel, stride, **options)  # type: ignore[arg-type]


class Residual(nn.Module):
    """A block of a residual network: pairs of norm and convolution in either order, and a shortcut.

    layers: output channels and kernel of each convolution; the one at `strided` has the stride. projection: `norm` (a
    1x1 convolution and a norm), `plain` (without the norm), or `pad` (zeros, which own no parameters).
    """

    def __init__(
        self,
        inside: int,
        layers: Sequence[tuple[int, int]],
        stride: int,
        strided: int = 0,
        projection: str = "norm",
        norm_first: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.out, self.stride, self.norm_first = layers[-1][0], stride, norm_first
        widths = [inside, *(channels for channels, _ in layers)]
        self.convs = nn.ModuleList(
            conv(widths[i], channels, kernel, stride if i == strided else 1, bias=bias)
            for i, (channels, kernel) in enumerate(layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (widths[:-1] if norm_first else widths[1:]))
        self.shortcut: nn.Module | None = None
        if (stride != 1 or inside != self.out) and projection != "pad":
            parts = [conv(inside, self.out, 1, stride, bias=bias)]
            self.shortcut = nn.Sequential(*parts, *([nn.BatchNorm2d(self.out)] if projection == "norm" else []))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer, norm in zip(self.convs, self.norms, strict=True):
            out = layer(norm(out)) if self.norm_first else norm(layer(out))
        if self.shortcut is not None:
            return out + self.shortcut(x)
        thin = x[:, :, :: self.stride, :: self.stride]
        return out + F.pad(thin, (0, 0, 0, 0, 0, self.out - thin.shape[1]))


def residual(
    stem: int, stages: Sequence[tuple[int, int]], bottleneck: int = 0, *, last_norm: bool = False, **options: object
) -> nn.Module:
    """A residual network; stages: width and number of blocks, the first of which halves the picture but in stage 1.

    bottleneck: by how much a block of three convolutions widens its output; 0: two convolutions. options: of Residual.
    """
    norm_first = bool(options.get("norm_first"))
    blocks: list[nn.Module] = [conv(3, stem, bias=bool(options.get("bias")))]
    blocks += [] if norm_first else [nn.BatchNorm2d(stem)]
    channels = stem
    for i, (width, count) in enumerate(stages):
        for j in range(count):
            layers = [(width, 3), (width, 3)]
            if bottleneck:
                layers = [(width, 1), (width, 3), (bottleneck * width, 1)]
            block = Residual(channels, layers, 2 if i and not j else 1, **options)  # type: ignore[arg-type]
            channels = block.out
            blocks.append(block)
    blocks += [nn.BatchNorm2d(channels)] if last_norm else []
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Dense(nn.Module):
    """A layer of DenseNet, whose output is joined to its input."""

    def __init__(self, inside: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(inside)]
        if bottleneck:
            layers += [conv(inside, 4 * growth, 1), nn.BatchNorm2d(4 * growth)]
        self.layers = nn.Sequential(*layers, conv(4 * growth if bottleneck else inside, growth))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def densenet(depth: int, bottleneck: bool, compression: float = 1.0, stem: int = 24, growth: int = 12) -> nn.Module:
    """DenseNet of three blocks with transitions between them (Huang et al. 2017)."""
    layers: list[nn.Module] = [conv(3, stem)]
    channels = stem
    for block in range(3):
        for _ in range((depth - 4) // (6 if bottleneck else 3)):
            layers.append(Dense(channels, growth, bottleneck))
            channels += growth
        layers.append(nn.BatchNorm2d(channels))
        if block < 2:
            out = int(channels * compression)
            layers += [conv(channels, out, 1), nn.AvgPool2d(2)]
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def vgg(widths: Sequence[int | tuple[int, int]], *hidden: int, norms: bool = True) -> nn.Module:
    """VGG: 0 stands for a pooling layer, a pair for channels and kernel. hidden: widths of linear layers before the
    last one; norms: whether batch norms follow the layers."""
    layers: list[nn.Module] = []
    channels, side = 3, 32
    for entry in widths:
        if entry == 0:
            layers.append(nn.MaxPool2d(2))
            side //= 2
            continue
        out, kernel = entry if isinstance(entry, tuple) else (entry, 3)
        layers.append(conv(channels, out, kernel, padding=1, bias=True))  # as in the code of Lee et al. 2019: also 1x1
        side += 3 - kernel
        layers += [nn.BatchNorm2d(out)] if norms else []
        channels = out
    inside = channels * side**2
    layers.append(nn.Flatten())
    for width in hidden:
        layers += [nn.Linear(inside, width), *([nn.BatchNorm1d(width)] if norms else [])]
        inside = width
    return nn.Sequential(*layers, nn.Linear(inside, 10))


def mobilenet() -> nn.Module:
    """MobileNet (Howard et al. 2017) with strides for 32x32 pixels."""
    layers: list[nn.Module] = [conv(3, 32), nn.BatchNorm2d(32)]
    channels = 32
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for out, stride in plan:
        layers += [conv(channels, channels, 3, stride, groups=channels), nn.BatchNorm2d(channels)]
        layers += [conv(channels, out, 1), nn.BatchNorm2d(out)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


VGG16 = [64, 64, 0, 128, 128, 0, *[256] * 3, 0, *[512] * 3, 0, *[512] * 3, 0]
VGG19 = [64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0]
VGG16_C = [64, 64, 0, 128, 128, 0, 256, 256, (256, 1), 0, 512, 512, (512, 1), 0, 512, 512, (512, 1), 0]
WIDE = [(128, 3), (256, 3), (512, 3)]


def _cifar_resnet(blocks: int) -> nn.Module:
    return residual(16, [(16, blocks), (32, blocks), (64, blocks)], projection="pad")


# What the paper's sizes count: for ResNet-20 and -32, PreResNet-110 and VGG-7, ImageNet's networks at 32 pixels.
COUNTED: dict[str, Callable[[], nn.Module]] = {
    "ResNet-34": lambda: residual(64, [(64, 3), (128, 4), (256, 6), (512, 3)]),
    "ResNet-18": lambda: residual(64, [(64, 2), (128, 2), (256, 2), (512, 2)]),
    "PreActResNet-101": lambda: residual(
        64, [(64, 3), (128, 4), (256, 23), (512, 3)], 4, strided=1, projection="plain", norm_first=True
    ),
    "DenseNet-B-40": lambda: densenet(40, bottleneck=True),
    "DenseNet-B-76": lambda: densenet(76, bottleneck=True),
    "DenseNet-B-100": lambda: densenet(100, bottleneck=True),
    # strides in the second convolutions of blocks, and biases
    "WRN-22-8 with other strides": lambda: residual(
        16, WIDE, strided=1, projection="plain", norm_first=True, bias=True, last_norm=True
    ),
    "VGG-11": lambda: vgg([64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0]),
    "VGG-16": lambda: vgg(VGG16),
    "VGG-19": lambda: vgg(VGG19),
    "MobileNet": mobilenet,
}
# The networks as the cited papers, or the code that their authors published, describe them.
NAMED: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: _cifar_resnet(3),  # He et al. 2016, shortcuts without parameters
    "ResNet-32": lambda: _cifar_resnet(5),
    "PreResNet-110": lambda: residual(  # the code of Liu et al.: bottlenecks, 12 to a stage
        16, [(16, 12), (32, 12), (64, 12)], 4, strided=1, projection="plain", norm_first=True, last_norm=True
    ),
    "DenseNet-40": lambda: densenet(40, bottleneck=False, stem=16),  # Huang et al. 2017, 1.0 M parameters
    "DenseNet-76": lambda: densenet(76, bottleneck=True),  # Achterhold et al.: "k = 12, with bottlenecks"
    "DenseNet-100": lambda: densenet(100, bottleneck=True, compression=0.5),  # Liu et al.: DenseNet-BC
    "WRN-22-8": lambda: residual(16, WIDE, projection="plain", norm_first=True, last_norm=True),
    "VGG-7": lambda: vgg([128, 128, 0, 256, 256, 0, 512, 512, 0], 1024),  # van Baalen et al.
    "VGG16-C": lambda: vgg(VGG16_C, 512, 512),  # the code of Dettmers and Zettlemoyer, after Lee et al. 2019
    "VGG-16": COUNTED["VGG-16"],
    "VGG-19": COUNTED["VGG-19"],
    "MobileNet": mobilenet,
}
