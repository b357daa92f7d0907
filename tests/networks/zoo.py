"""Small configurations of networks that others wrote: every family of torchvision's classifiers, and more."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation import FCN, LRASPP
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2

from qprune.compression.config import PruneConfig

BATCH = 4
_TOKENS = 6


def pictures(size: int = 32) -> Tensor:
    """A batch of pictures."""
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))


def loss(network: nn.Module, example: Any) -> Tensor:
    """Return the mean square of all that a network returns."""
    output = network(**example) if isinstance(example, dict) else network(example)
    found = [leaf for leaf in tree_leaves(dict(output) if isinstance(output, dict) else output) if _is_float(leaf)]
    return torch.stack([leaf.float().square().mean() for leaf in found]).sum()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        name: Of the family.
        library: The package that it comes from.
        make: Builds it, with random weights.
        example: A batch, as the network takes it in evaluation mode.
        loss: Of the network and the batch.
        prune: How it is pruned.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    example: Callable[[], Any] = pictures
    loss: Callable[[nn.Module, Any], Tensor] = loss
    prune: PruneConfig = PruneConfig(window=BATCH)  # noqa: RUF009  (frozen)

    @property
    def missing(self) -> bool:
        """Whether its library is not installed."""
        return find_spec(self.library) is None


def _thin(factory: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """Build a network of torchvision with an eighth of its channels."""
    with torch.device("meta"):
        network = factory(num_classes=3, **arguments)
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
                setattr(module, name, _narrow(layer))
    return network


def _narrow(layer: nn.Conv2d | nn.BatchNorm2d | nn.Linear) -> nn.Module:
    def part(channels: int) -> int:
        return channels if channels == 3 else channels // 8

    if isinstance(layer, nn.BatchNorm2d):
        return nn.BatchNorm2d(part(layer.num_features), layer.eps)
    if isinstance(layer, nn.Linear):
        return nn.Linear(part(layer.in_features), part(layer.out_features))
    names = ("kernel_size", "stride", "padding", "dilation")
    options: dict[str, Any] = {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}
    return nn.Conv2d(part(layer.in_channels), part(layer.out_channels), groups=-(-layer.groups // 8), **options)


def _mobilenet_v3() -> nn.Module:
    setting = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [setting(8, 3, 16, 8, True, "RE", 2), setting(8, 5, 24, 16, True, "HS", 2)]
    return tv.MobileNetV3(blocks, last_channel=32, num_classes=3)


def _efficientnet(*blocks: Any) -> nn.Module:
    return tv.EfficientNet(list(blocks), dropout=0.1, num_classes=3, last_channel=32)


def _fcn() -> nn.Module:
    backbone = _thin(tv.ResNet, block=BasicBlock, layers=[1, 1, 1, 1])
    return FCN(create_feature_extractor(backbone, {"layer4": "out"}), FCNHead(64, 3))


def _lraspp() -> nn.Module:
    blocks = {"features.0": "low", "features.3": "high"}
    return LRASPP(create_feature_extractor(_mobilenet_v3(), blocks), 8, 96, 3, inter_channels=16)


class _Pyramid(nn.Module):
    """Two levels for a detector, whose heads are called once for each."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, 4, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.act1(self.first(x))
        return {"0": first, "1": self.act2(self.second(first))}


def _retinanet() -> nn.Module:
    anchors = AnchorGenerator(((16,), (32,)), ((1.0,), (1.0,)))
    sizes = {"min_size": 64, "max_size": 64, "score_thresh": 0.0, "detections_per_img": 5}
    return RetinaNet(_Pyramid(), 3, anchor_generator=anchors, **sizes)


def _scenes() -> tuple[list[Tensor]]:
    return ([*pictures(64)],)


def _detection_loss(network: nn.Module, example: Any) -> Tensor:
    (scenes,) = example
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    return torch.stack(list(network(scenes, [box] * len(scenes)).values())).sum()


def _torchvision() -> list[Network]:
    add = partial(Network, library="torchvision")
    inception = {"aux_logits": False, "init_weights": False}
    resnext = {"groups": 32, "width_per_group": 4}
    swin = partial(tv.SwinTransformer, [4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=3)
    return [
        add("AlexNet", make=lambda: _thin(tv.AlexNet), example=partial(pictures, 64)),
        add("ConvNeXt", make=lambda: tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3)),
        add("DenseNet", make=lambda: tv.DenseNet(8, (2, 2, 2, 2), 16, num_classes=3)),
        add(
            "EfficientNet", make=lambda: _efficientnet(MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 5, 2, 8, 16, 2))
        ),
        add(
            "EfficientNetV2",
            make=lambda: _efficientnet(FusedMBConvConfig(2, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2)),
        ),
        add("GoogLeNet", make=lambda: _thin(tv.GoogLeNet, **inception)),
        add("Inception v3", make=lambda: _thin(tv.Inception3, **inception), example=partial(pictures, 80)),
        add("MaxViT", make=lambda: tv.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 8, 0.0, num_classes=3)),
        add("MNASNet", make=lambda: _thin(tv.MNASNet, alpha=1.0)),
        add("MobileNetV2", make=lambda: tv.MobileNetV2(3, 0.25, [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 2, 2]])),
        add("MobileNetV3", make=_mobilenet_v3),
        add("RegNet", make=lambda: tv.RegNet(BlockParams.from_init_params(4, 8, 8.0, 2.0, 8, se_ratio=0.25), 3)),
        add("ResNet", make=lambda: _thin(tv.ResNet, block=BasicBlock, layers=[1, 1, 1, 1])),
        add("ResNeXt", make=lambda: _thin(tv.ResNet, block=Bottleneck, layers=[1, 1, 1, 1], **resnext)),
        add("ShuffleNetV2", make=lambda: tv.ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 48], 3)),
        add("SqueezeNet", make=lambda: _thin(tv.SqueezeNet, version="1_1")),
        add("Swin", make=lambda: swin(block=SwinTransformerBlock)),
        add("SwinV2", make=lambda: swin(block=SwinTransformerBlockV2)),
        add("VGG", make=lambda: _thin(tv.vgg11_bn)),
        add("ViT", make=lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)),
        add("FCN", make=_fcn),
        add("LRASPP", make=_lraspp),
        add("RetinaNet", make=_retinanet, example=_scenes, loss=_detection_loss),
    ]


def _timm(name: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, while they are imported
        import timm.models

    network: nn.Module = getattr(timm.models, name)(num_classes=3, **options)
    return network


def _of_timm() -> list[Network]:
    mixer = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}
    networks: dict[str, tuple[str, int, dict[str, Any]]] = {
        "ByobNet": ("test_byobnet", 64, {}),
        "ConvNeXt": ("test_convnext", 64, {}),
        "EfficientNet": ("test_efficientnet", 64, {}),
        "MambaOut": ("test_mambaout", 64, {}),
        "MLP-Mixer": ("MlpMixer", 32, mixer),
        "NFNet": ("test_nfnet", 64, {}),
        "ResNet": ("test_resnet", 64, {}),
        "ViT": ("test_vit", 32, {"img_size": 32}),
    }
    return [
        Network(name, "timm", partial(_timm, model, **options), partial(pictures, size))
        for name, (model, size, options) in networks.items()
    ]


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def _transformers(network: str, config: str, **options: Any) -> nn.Module:
    import transformers

    built: nn.Module = getattr(transformers, network)(getattr(transformers, config)(**options))
    return built


def _tokens(decoder: bool = False) -> dict[str, Tensor]:
    tokens = torch.arange(BATCH * _TOKENS).reshape(BATCH, _TOKENS) % 20 + 1
    found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return found | ({"decoder_input_ids": tokens} if decoder else {})


def _of_transformers() -> list[Network]:
    add = partial(Network, library="transformers", example=_tokens, prune=PruneConfig(window=BATCH, granularity="last"))
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    make = partial(partial, _transformers)
    return [
        add("BERT", make=make("BertForSequenceClassification", "BertConfig", vocab_size=24, **_SMALL)),
        add("GPT-2", make=make("GPT2LMHeadModel", "GPT2Config", vocab_size=24, use_cache=False, **gpt2)),
        add("Llama", make=make("LlamaForCausalLM", "LlamaConfig", vocab_size=24, use_cache=False, **_SMALL)),
        add(
            "T5",
            make=make("T5ForConditionalGeneration", "T5Config", vocab_size=24, use_cache=False, **t5),
            example=partial(_tokens, decoder=True),
        ),
    ]


ZOO = (*_torchvision(), *_of_timm(), *_of_transformers())
