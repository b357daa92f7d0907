import torch
from torch import Tensor, nn

from qprune.tasks.models.mobilenetv2 import Block, MobileNetV2


def test_blocks_are_seventeen_with_four_projected_shortcuts() -> None:
    layers = MobileNetV2().layers
    assert [i for i, block in enumerate(layers) if block.get_submodule("conv2").stride == (2, 2)] == [3, 6, 13]
    assert [i for i, block in enumerate(layers) if not isinstance(block.get_submodule("shortcut"), nn.Identity)] == [
        0, 1, 10, 16
    ]  # fmt: skip
    assert len(layers) == 17


def outputs(block: Block, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for name, module in block.named_modules():
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
    with torch.no_grad():
        block.eval()(x)
    return seen


def test_output_of_a_block_with_stride_2_is_that_of_its_last_norm() -> None:
    seen = outputs(Block(8, 16, expansion=6, stride=2), torch.randn(2, 8, 8, 8))
    assert torch.equal(seen[""], seen["bn3"])
    assert seen[""].shape == (2, 16, 4, 4)


def test_output_of_a_block_with_stride_1_is_the_signed_residual_sum() -> None:
    x = torch.randn(2, 8, 8, 8)
    same = outputs(Block(8, 8, expansion=6, stride=1), x)
    assert torch.equal(same[""], same["bn3"] + x)
    projected = outputs(Block(8, 16, expansion=6, stride=1), x)
    assert torch.equal(projected[""], projected["bn3"] + projected["shortcut"])
    assert projected[""].min() < 0  # no ReLU after the sum
