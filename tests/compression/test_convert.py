"""Converted networks are ordinary ones: traced, exported, compiled, cast, saved, and loaded without qprune."""

import copy
import functools
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV2, VisionTransformer

from qprune.compression.compressor import Compressor, attach, compress
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.plan import Plan
from qprune.compression.schedule import Schedule

# What compress says of networks with many sums and attention is not the subject here.
pytestmark = pytest.mark.filterwarnings("ignore:most elements stay float")

SCHEDULE = Schedule(t_p=0, dt_p=1, n=2, t_qw=3, t_qf=4)


def train(network: nn.Module, compressor: Compressor, example: Tensor) -> None:
    """Every phase, two steps longer."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for step in range(6):
        compressor.at(step)
        network.train()
        optimizer.zero_grad()
        network(example).square().mean().backward()
        optimizer.step()


def pictures(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def mobilenet(border: str = "tile") -> Compressor:
    torch.manual_seed(0)
    network = MobileNetV2(num_classes=3, width_mult=0.25, inverted_residual_setting=[[2, 8, 2, 2]])
    return compress(network, pictures(4), SCHEDULE, 1, 4, PruneConfig(border=border), QuantizeConfig())


def transformer() -> Compressor:
    torch.manual_seed(0)
    network = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)
    nn.init.normal_(network.heads.head.weight)  # zeros in torchvision
    quantization = QuantizeConfig(rounding="nearest", weight_axis="output", feature_bits=6)
    return compress(network, pictures(4), SCHEDULE, 1, 4, PruneConfig(granularity="last"), quantization)


NETWORKS = pytest.mark.parametrize("make", [mobilenet, transformer])
Make = Callable[[], Compressor]


@functools.cache
def converted(make: Make) -> tuple[nn.Module, nn.Module]:
    """A converted network, and the one that it was made of, in evaluation mode."""
    compressor = make()
    train(compressor.network, compressor, pictures(4))
    return compressor.convert().eval(), compressor.network.eval()


def test_programs_and_pickles_take_any_batch_and_are_loaded_where_qprune_is_not_installed(tmp_path: Path) -> None:
    expected = []
    for make in (mobilenet, transformer):
        plain, attached = converted(make)
        batch = torch.export.Dim("batch", min=2, max=512)
        program = torch.export.export(plain, (pictures(4),), dynamic_shapes=({0: batch},))
        for size in (2, 8, 32):  # 8 and 32 are channels of both
            assert torch.equal(program.module()(pictures(size)), attached(pictures(size)))
        torch.export.save(program, tmp_path / f"{make.__name__}.pt2")
        torch.save(plain, tmp_path / f"{make.__name__}.pt")
        expected.append((make.__name__, pictures(3, seed=2), attached(pictures(3, seed=2)).detach()))
    torch.save(expected, tmp_path / "expected")
    code = (
        "import sys; sys.modules['qprune'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "for name, x, y in torch.load('expected'):\n"
        "    program = torch.export.load(f'{name}.pt2').module()\n"
        "    for network in (program, torch.load(f'{name}.pt', weights_only=False)):\n"
        "        assert torch.equal(network(x), y), name\n"
        "assert not [name for name in sys.modules if name.startswith('qprune.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_onnx_with_a_dynamic_batch() -> None:
    """By torch's own exporter; tests/export has that of qprune."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed, which torch.onnx.export needs")
    plain, attached = converted(transformer)
    batch = torch.export.Dim("batch", min=2, max=512)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(plain, (pictures(4),), dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (name,) = [each.name for each in session.get_inputs()]
    for size in (2, 8):
        (found,) = session.run(None, {name: pictures(size).numpy()})
        # Sums in another order may put a feature on the neighbouring point of its grid.
        torch.testing.assert_close(torch.from_numpy(found), attached(pictures(size)).detach(), rtol=0.05, atol=0.02)


@NETWORKS
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_jit_trace(make: Make) -> None:
    plain, attached = converted(make)
    # Its second trace, to check, takes torch's fast path through attention, also of a network that has no operators.
    traced = torch.jit.trace(plain, pictures(4), check_trace=make is mobilenet)
    for size in (2, 8, 32):
        assert torch.equal(traced(pictures(size)), attached(pictures(size)))


@NETWORKS
def test_torch_compile_without_graph_breaks(make: Make) -> None:
    plain, attached = converted(make)
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pictures(4)), attached(pictures(4)))


def kept_border() -> Compressor:
    return mobilenet("keep")


@pytest.mark.parametrize("make", [mobilenet, kept_border])
def test_masks_are_laid_over_pictures_of_another_size(make: Make) -> None:
    plain, attached = converted(make)
    for size in ((48, 32), (32, 72), (16, 24)):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
        assert torch.equal(plain(x), attached(x))


def test_pictures_of_any_size_are_exported() -> None:
    plain, attached = converted(mobilenet)
    height = 8 * torch.export.Dim("eighth", min=2, max=64)
    program = torch.export.export(plain, (torch.randn(2, 3, 40, 32),), dynamic_shapes=({2: height},))
    for size in (16, 32, 48, 72):
        x = torch.randn(2, 3, size, 32, generator=torch.Generator().manual_seed(size))
        assert torch.equal(program.module()(x), attached(x))


@NETWORKS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_weights_and_features_on_their_grids(make: Make, dtype: torch.dtype) -> None:
    plain, _ = converted(make)
    half = copy.deepcopy(plain).to(dtype)
    grids = {name: (8 if make is mobilenet else 6) for name, _ in plain.named_modules() if name.endswith("_operators")}
    assert grids
    found: dict[str, Tensor] = {}
    for name in grids:
        site = half.get_submodule(name.rpartition(".")[0])
        if name.endswith("output_operators"):
            site.register_forward_hook(lambda _m, _a, out, name=name: found.update({name: out.detach()}))
        else:
            site.register_forward_pre_hook(lambda _m, args, name=name: found.update({name: args[0].detach()}))
    assert half(pictures(4).to(dtype)).dtype == dtype
    for name, bits in grids.items():
        scaled = found[name].double() * 2.0 ** float(half.get_submodule(name).quantizer.decimal)
        assert found[name].dtype == dtype
        assert torch.equal(scaled, scaled.round()), name
        assert float(scaled.abs().max()) <= 2 ** (bits - 1), name
    for name, weight in plain.named_parameters():
        if weight.dim() > 1 and "class" not in name:  # 8 bits are exact in both types
            assert torch.equal(half.get_parameter(name).float(), weight) or "pos_embedding" in name, name


def test_what_was_frozen_stays_frozen() -> None:
    torch.manual_seed(0)
    network = MobileNetV2(num_classes=3, width_mult=0.25, inverted_residual_setting=[[2, 8, 2, 2]])
    network.features.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in network.named_parameters()}
    compressor = compress(network, pictures(4), SCHEDULE, 1, 4)
    train(network, compressor, pictures(4))
    after = dict(compressor.convert().named_parameters())
    assert list(after) == list(before)
    assert {name: p.requires_grad for name, p in after.items()} == {name: r for name, (r, _) in before.items()}
    raw = network.features[0][0].parametrizations.weight.original
    assert not raw.requires_grad
    assert torch.equal(raw, before["features.0.0.weight"][1])
    assert not torch.equal(network.classifier[1].parametrizations.weight.original, before["classifier.1.weight"][1])


class Attention(nn.Module):
    """Parameters in an order of its own, some frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.attend = nn.Parameter(torch.ones(1)), nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.attend.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attend(x, x[..., :4], x[..., 4:])[0]
        return y * self.scale


class BiasFirst(nn.Linear):
    """A linear layer that declares its bias before its weight."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        weight = self.weight
        del self.weight
        self.register_parameter("weight", weight)


@pytest.mark.filterwarnings("ignore:most elements stay float:UserWarning")
@pytest.mark.parametrize("make", [Attention, lambda: nn.Sequential(BiasFirst(), nn.Tanh(), nn.Linear(8, 4))])
def test_parameters_keep_their_order_and_freedom(make: Callable[[], nn.Module]) -> None:
    network = make()
    before = [(name, p.requires_grad) for name, p in network.named_parameters()]
    compressor = compress(network, torch.randn(3, 4, 8), SCHEDULE, 1, 3, PruneConfig(granularity="last"))
    train(network, compressor, torch.randn(3, 4, 8))
    assert [(name, p.requires_grad) for name, p in compressor.convert().named_parameters()] == before


class Tied(nn.Module):
    """An encoder and a decoder of one weight; of a convolution and a linear layer if `convolve`."""

    def __init__(self, convolve: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1) if convolve else nn.Linear(4, 4)
        self.second = nn.Conv2d(4, 4, 1) if convolve else nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


@pytest.mark.parametrize("convolve", [False, True])
def test_weights_that_are_tied_stay_tied(convolve: bool) -> None:
    network = Tied(convolve)
    x = torch.randn(3, 4, 5, 4) if not convolve else torch.randn(3, 4, 5, 5)
    plan = Plan.from_globs(network, ["first", "second"], ["first", "second"])
    compressor = attach(network, plan, SCHEDULE.in_steps(1, 3), x, PruneConfig(), QuantizeConfig())
    train(network, compressor, x)
    assert len(list(network.parameters())) == 3
    plain = compressor.convert()
    assert plain.first.weight is plain.second.weight
    assert len(list(plain.parameters())) == 3
    assert torch.equal(plain(x), network.eval()(x))


def test_the_state_of_a_converted_network_has_its_masks_and_grids() -> None:
    """Loaded into one that was converted from other values of the same plan, it gives the saved outputs."""
    plain, attached = converted(mobilenet)
    compressor = mobilenet()
    with torch.no_grad():
        for parameter in compressor.network.parameters():
            parameter.mul_(9.0)
    train(compressor.network, compressor, 40 * pictures(4))
    other = compressor.convert().eval()
    decimals = {name: value for name, value in plain.state_dict().items() if name.endswith("quantizer.decimal")}
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in decimals.items())
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(pictures(4)), attached(pictures(4)))


def test_a_converted_network_without_operators_refuses_the_state_of_one_with_them() -> None:
    plain, _ = converted(mobilenet)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*output_operators.quantizer.decimal"):
        mobilenet().convert().load_state_dict(plain.state_dict())


def test_a_pickle_of_an_attached_network_is_refused_by_torch_with_the_way_out() -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(mobilenet().network, io.BytesIO())
