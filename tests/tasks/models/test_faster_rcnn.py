"""The detector: the paper's counts, frozen parts, and torchvision's parts put together with the right numbers."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet101
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.resnet import Bottleneck

from qprune.compression.activation_trace import Trace
from qprune.compression.footprint import paper_footprint
from qprune.errors import UserError
from qprune.tasks.models.faster_rcnn import FasterRCNN, FrozenBatchNorm, ProposalHead, spread_regions


def on_meta(**options: object) -> FasterRCNN:
    """A network of shapes without values."""
    with torch.device("meta"):
        return FasterRCNN(**options)  # type: ignore[arg-type]


def small() -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(4, "small", 64, (16, 32, 48), rois=8)


def counted(side: tuple[int, int] = (480, 720), rois: int = 128) -> tuple[Tensor, None, Tensor]:
    return torch.zeros(1, 3, *side), None, spread_regions(rois, *side)


def test_elements_are_those_of_the_paper() -> None:
    """Spec 5.1, twice over: every convolution and norm, 128 regions, one picture of 480x720."""
    size = paper_footprint(on_meta(stride_in="1x1"), counted())
    assert size.elements("weight") == 47_462_111
    assert size.elements("feature") == 511_314_568
    of_part = dict.fromkeys(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "rpn", "box_predictor"), 0)
    for entry in size.entries:
        if entry.kind == "feature":
            [part] = [part for part in of_part if part in entry.name.split(".")[: 3 if "roi" in entry.name else 2]]
            of_part[part] += entry.elements // 2
    assert of_part == {
        "conv1": 5_529_600,
        "bn1": 5_529_600,
        "layer1": 2 * 30_412_800,
        "layer2": 2 * 19_353_600,
        "layer3": 2 * 49_075_200,
        "layer4": 2 * 128 * 180_224,
        "rpn": 764_100,
        "box_predictor": 128 * 105,
    }


def test_the_strides_of_torchvision_s_weights_put_out_more() -> None:
    """The first convolutions of three stages then work before the stride: four times their elements."""
    first = 128 * 60 * 90 + 256 * 30 * 45 + 128 * 512 * 4 * 4
    region = 128 * 512 * (49 - 4 * 16)  # a region's 7x7 cells become 4x4
    extra = paper_footprint(on_meta(), counted()).elements("feature") - 511_314_568
    assert extra == 2 * 2 * (3 * first + region)


def test_weights_of_torchvision_s_classifier_fit_and_give_its_features() -> None:
    torch.manual_seed(0)
    classifier = resnet101().eval()
    network = FasterRCNN(short_side=32).eval()
    network.load_imagenet(classifier.state_dict())
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        stem = classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(x))))
        expected = classifier.layer3(classifier.layer2(classifier.layer1(stem)))
        features = network.backbone(x)
        assert torch.equal(features, expected)
        assert torch.equal(network.roi_heads.box_head.layer4(features), classifier.layer4(expected))


def test_stem_first_stage_and_norms_are_frozen() -> None:
    network = small().train()
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    norms = {name for name, module in network.named_modules() if isinstance(module, FrozenBatchNorm)}
    by_norm = {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}
    assert by_norm <= frozen
    others = frozen - by_norm
    assert {name.split(".")[1] for name in others} == {"conv1", "layer1"}
    assert len(others) == 1 + 4
    assert not any(network.get_submodule(name).training for name in norms)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network([torch.rand(3, 64, 80)], [{"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])}])
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


@pytest.mark.parametrize(("stride_in", "strides"), [("3x3", ((1, 1), (2, 2))), ("1x1", ((2, 2), (1, 1)))])
def test_the_stride_is_in_the_convolution_that_is_named(stride_in: str, strides: object) -> None:
    network = on_meta(stride_in=stride_in)
    for layers in (network.backbone.layer2, network.backbone.layer3, network.roi_heads.box_head.layer4):
        first, *rest = layers
        assert (first.conv1.stride, first.conv2.stride) == strides
        assert {(block.conv1.stride, block.conv2.stride) for block in rest} == {((1, 1), (1, 1))}
    assert [len(network.backbone.get_submodule(f"layer{i}")) for i in (1, 2, 3)] == [3, 4, 23]


def test_objectness_is_a_softmax_over_two_classes() -> None:
    torch.manual_seed(0)
    head, x = ProposalHead(8, anchors=3), torch.randn(2, 8, 5, 6)
    [objectness], [deltas] = head([x])
    two = head.cls(head.relu(head.conv(x))).unflatten(1, (2, 3))  # (N, class, anchor, H, W)
    assert torch.allclose(objectness.sigmoid(), two.softmax(dim=1)[:, 1], atol=1e-6)
    assert (objectness.shape, deltas.shape) == ((2, 3, 5, 6), (2, 12, 5, 6))


def test_numbers_are_those_of_the_recipe() -> None:
    network = on_meta()
    rpn: RegionProposalNetwork = network.rpn
    assert (rpn.nms_thresh, rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (
        0.7, 256, 0.5
    )  # fmt: skip
    assert rpn._post_nms_top_n == {"training": 2000, "testing": 300}
    assert rpn.anchor_generator.num_anchors_per_location() == [9]
    heads = network.roi_heads
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (128, 0.25)
    assert (heads.nms_thresh, heads.detections_per_img, heads.score_thresh) == (0.3, 100, 0.0)
    assert network.transform.min_size == (600,)
    image = nn.functional.interpolate(torch.rand(1, 3, 60, 200), scale_factor=1)[0]
    [resized], _ = network.transform.resize(image, None)[0][None], None
    assert tuple(resized.shape[-2:]) == (600, 2000)  # the long side has no limit


def test_the_raw_outputs_do_not_depend_on_what_is_found() -> None:
    network, (image, targets, regions) = small().eval(), counted((64, 96), rois=8)
    objectness, deltas, logits, offsets = network(image, targets, regions)
    assert [tuple(t.shape) for t in (objectness, deltas, logits, offsets)] == [
        (1, 9, 4, 6), (1, 36, 4, 6), (8, 4), (8, 16)
    ]  # fmt: skip
    stored = list(Trace(network).run((image, targets, regions)).reads)
    assert stored[0].name == "input"
    assert stored[0].elements == 3 * 64 * 96
    assert {"roi_heads.box_head.layer4.0.relu", "roi_heads.box_head.pool", "rpn.head.relu"} <= {s.name for s in stored}


def test_raw_outputs_are_those_of_the_detector() -> None:
    """The same regions through torchvision's own way of calling the parts."""
    network = small().eval()
    image, regions = torch.rand(3, 64, 64), torch.tensor([[0.0, 0, 32, 32], [16, 8, 60, 50]])
    batch, _ = network.transform([image])
    with torch.no_grad():
        features = {"0": network.backbone(batch.tensors)}
        pooled = network.roi_heads.box_roi_pool(features, [regions], batch.image_sizes)
        logits, _ = network.roi_heads.box_predictor(network.roi_heads.box_head(pooled))
        assert torch.equal(network(batch.tensors, None, regions)[2], logits)


def test_regions_lie_inside_the_picture() -> None:
    regions = spread_regions(5, 60, 90)
    assert regions[0].tolist() == [0, 0, 30, 20]
    assert regions[-1].tolist() == pytest.approx([60, 40, 90, 60])


def test_untrained_sums_do_not_explode() -> None:
    torch.manual_seed(0)
    network = FasterRCNN(backbone="resnet50").eval()
    with torch.no_grad():
        assert 0.05 < network.backbone(torch.randn(1, 3, 64, 64)).std() < 20
    assert all(isinstance(block, Bottleneck) for block in network.backbone.layer3)


def test_other_backbones_and_strides_are_refused() -> None:
    with pytest.raises(UserError, match="task.backbone='resnet100' is not one of resnet101, resnet50, small; did you"):
        FasterRCNN(backbone="resnet100")
    with pytest.raises(UserError, match="task.stride_in='2x2' is not one of 3x3, 1x1"):
        FasterRCNN(backbone="small", stride_in="2x2")
