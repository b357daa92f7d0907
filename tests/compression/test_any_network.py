"""Networks that were not written for compression: what is found, what is left alone, and what is said about it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import qprune
from qprune.compression.auto_plan import auto_plan
from qprune.compression.compressor import Compressor, compress
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.plan import INPUT, Plan
from qprune.compression.pruner import Pruner
from qprune.compression.schedule import Schedule
from qprune.errors import UserError

SCHEDULE = Schedule(t_p=0, dt_p=1, n=4, t_qw=5, t_qf=6)
PICTURES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(network: nn.Module, example: Tensor, prune: PruneConfig | None = None) -> Compressor:
    """Every phase of the schedule, one step each."""
    compressor = compress(network, example, SCHEDULE, 1, len(example), prune or PruneConfig())
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    for step in range(8):
        compressor.at(step)
        network.train()
        optimizer.zero_grad()
        network(example).square().mean().backward()
        optimizer.step()
    return compressor


def features(network: nn.Module, example: object, **globs: list[str]) -> dict[str, tuple[bool, bool]]:
    """Path of each feature site -> whether it is pruned, and quantized."""
    plan = auto_plan(network, example, **globs)
    return {site.path: (site.prune, site.quantize) for site in plan.sites if site.kind == "feature"}


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1", "mnasnet0_5"])
def test_classifiers_of_torchvision_keep_nothing_back_but_their_result(name: str) -> None:
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(num_classes=3)
    compressor = trained(network, PICTURES)
    assert compressor.sparsity == {"weight": pytest.approx(0.5, abs=1e-3), "feature": pytest.approx(0.5, abs=1e-3)}
    network.eval()
    assert torch.equal(compressor.convert()(PICTURES), network(PICTURES))
    alone = qprune.coverage(network, PICTURES)
    assert alone.names("weight") == []
    assert {t.reason for t in alone.tensors} <= {"the network's result", "not in the plan"}
    assert len(alone.names("feature")) <= 2  # SqueezeNet's last layer is a convolution, and a mean reads what it makes
    stored = [e for e in qprune.actual_footprint(network, PICTURES[:1]).entries if e.kind == "feature"]
    assert sum(e.bits == 8 for e in stored) == len(stored) - len(alone.tensors)


class Functional(nn.Module):
    """Activations as functions, a residual sum, squeeze and excite; `act` as a function or as a module."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.block = FunctionalBlock(act)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.block(x).mean((2, 3)))


class FunctionalBlock(nn.Module):
    def __init__(self, act: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gate, self.act = nn.Conv2d(8, 8, 1), act

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.conv1(x)))
        y = F.gelu(self.bn2(self.conv2(y))) if self.act is None else self.act(self.bn2(self.conv2(y)))
        return F.relu(x + y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())


def test_functional_activations_are_reached_where_a_module_or_a_single_reader_is() -> None:
    assert features(Functional(), PICTURES) == {
        INPUT: (False, True),
        "norm": (False, True),  # the first layer's: not pruned
        "block.conv2.input": (True, True),  # of the SiLU, which only conv2 reads
        "block.bn2": (True, False),  # of the GELU two functions read: zeros outlive it, a grid would not
        "block.gate.input": (False, True),  # a mean is made by no layer
        "block": (True, True),  # the residual sum
        "head.input": (False, True),
    }
    assert features(Functional(nn.GELU()), PICTURES)["block.act"] == (True, True)
    assert "block.bn2" not in features(Functional(nn.GELU()), PICTURES)


def test_what_is_made_by_functions_works_and_is_told() -> None:
    torch.manual_seed(0)
    network = Functional()
    compressor = trained(network, PICTURES)
    network.eval()
    assert torch.equal(compressor.convert()(PICTURES), network(PICTURES))
    alone = qprune.coverage(network, PICTURES)
    assert str(alone) == (
        "not compressed: 0 of 5 weights, 1 of 8 features; pruned but float: 1\n"
        f"  feature block, {4 * 8 * 900:,} elements: made by gelu in the forward of FunctionalBlock, and no module "
        "returns it; give the function a module of its own and call that (self.act = nn.SiLU(), for a sum "
        "self.sum = nn.Identity()), and it is found\n"
        "  feature head, 8 elements: the network's result"
    )
    seen = {e.name: [e.bits, e.density] for e in qprune.actual_footprint(network, PICTURES[:1]).entries}
    assert seen["head.weight"] == [8, 1.0]
    kept: dict[str, Tensor] = {}
    handle = network.block.conv2.register_forward_pre_hook(lambda _, args: kept.update(x=args[0]))
    network(PICTURES)
    handle.remove()
    on_grid = kept["x"] * 2.0**network.block.conv2.input_operators.quantizer.decimal
    assert torch.equal(on_grid, on_grid.round())


def test_include_and_exclude_take_a_layer_with_the_features_that_it_makes() -> None:
    everything = features(Functional(nn.GELU()), PICTURES)
    without = features(Functional(nn.GELU()), PICTURES, exclude=["block.conv2"])
    assert everything.keys() - without.keys() == {"block.act", "block.conv2.input"}
    assert features(Functional(nn.GELU()), PICTURES, include=["block.**"]).keys() == {
        "block.conv2.input",
        "block.act",
        "block.gate.input",
        "block",
    }
    assert features(Functional(), PICTURES, exclude=[INPUT, "head"]).keys().isdisjoint({INPUT, "head.input"})
    plan = auto_plan(Functional(), PICTURES, exclude=["**.conv?", "head"])
    assert [s.path for s in plan.without_operators] == ["block.conv1", "block.conv2", "head"]
    with pytest.raises(UserError, match=r"exclude: the glob 'haed' matches none of the network's 10 paths; did you me"):
        auto_plan(Functional(), PICTURES, exclude=["haed"])
    with pytest.raises(UserError, match=r"plan= says which tensors are taken, and include= and exclude= too; give one"):
        compress(Functional(), PICTURES, SCHEDULE, 1, 4, plan=plan, exclude=["head"])


class Tokens(nn.Module):
    """A transformer on whole numbers, with padding."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 6, 8))
        self.sum = nn.Identity()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor, pad: Tensor | None = None) -> Tensor:
        x = self.sum(self.embed(tokens) + self.position[:, : tokens.shape[1]])
        return self.head(self.encoder(x, src_key_padding_mask=pad).mean(1))


TOKENS = torch.arange(24).reshape(4, 6) % 11


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_is_compressed_with_the_projections_of_its_attention(norm_first: bool) -> None:
    torch.manual_seed(0)
    network = Tokens(norm_first)
    compressor = trained(network, TOKENS, PruneConfig(granularity="last"))
    network.eval()
    converted = compressor.convert()
    pad = torch.zeros(4, 6, dtype=torch.bool)
    pad[:, 4:] = True
    with torch.no_grad():  # in which torch would take its fast path, past all modules
        assert torch.equal(converted(TOKENS), network(TOKENS))
        assert torch.equal(converted(TOKENS, pad), network(TOKENS, pad))  # no nested tensors
        assert torch.equal(converted(TOKENS[:, :4]), network(TOKENS[:, :4]))  # another length
    with torch.enable_grad():
        torch.testing.assert_close(network(TOKENS), converted(TOKENS).detach())
    weight = converted.encoder.layers[1].self_attn.in_proj_weight
    assert type(converted.encoder.layers[1].self_attn).__name__ == "MultiheadAttention"
    assert list(dict(converted.named_parameters())) == list(dict(Tokens(norm_first).named_parameters()))
    assert 0.5 <= float((weight == 0).float().mean()) < 0.7
    assert float(weight.unique().numel()) <= 2**8
    sizes = {e.name: [e.bits, e.density] for e in qprune.actual_footprint(network, TOKENS[:1]).entries}
    assert sizes["encoder.layers.1.self_attn.in_proj_weight"] == [8, 0.5]
    assert [8, 0.5] in [value for name, value in sizes.items() if name.endswith("layers.0") or "linear" in name]
    alone = qprune.coverage(network, TOKENS)
    assert alone.names("weight") == ["position", "embed.weight"]
    assert alone.tensors[0].reason == "a parameter of Tokens, not the weight of a layer"
    assert alone.tensors[1].reason.startswith("a table of embeddings, which no automatic plan includes")


def test_a_batch_that_does_not_come_first_is_not_masked() -> None:
    network = nn.Sequential(nn.Linear(3, 4), Turned(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    assert features(network, torch.randn(5, 3)) == {INPUT: (False, True), "0": (False, True)}
    compress(network, torch.randn(5, 3), SCHEDULE, 1, 5)
    said = [t.reason for t in qprune.coverage(network, torch.randn(5, 3)).tensors]
    assert said[0] == "its first dimension is 4, not the batch of 5; put that first"


class Turned(nn.Module):
    """Puts the batch last, after which there is a sum over what was there first."""

    def forward(self, x: Tensor) -> Tensor:
        return x.T.cumsum(0)


def test_masks_of_the_last_dimension_fit_every_length() -> None:
    pruner = Pruner(0.5, "last")
    pruner.size_for_feature(torch.zeros(2, 6, 4))
    assert pruner.mask.shape == (1, 4)
    pruner.observe(torch.tensor([[[1.0, -4.0, 2.0, 3.0], [3.0, 4.0, 2.0, 5.0]]]))
    assert pruner.window.tolist() == [[2.0, 4.0, 2.0, 4.0]]
    pruner.update(pruner.window, 1.0)
    pruner.active = True
    assert pruner(torch.ones(1, 3, 4))[0, 2].tolist() == [0.0, 1.0, 0.0, 1.0]
    element = Pruner(0.5)
    element.size_for_feature(torch.zeros(2, 6, 4))
    element.active = True
    with pytest.raises(
        UserError, match=r"a feature of shape \(5, 4\) reached a pruner with a mask of \(6, 4\); give all"
    ):
        element(torch.ones(1, 5, 4))


def test_arguments_may_be_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, *, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    example = {"x": torch.randn(2, 3)}
    assert features(Named(), example) == {"first.input": (False, True), "first": (False, True)}
    network = Named()
    plan = Plan.from_globs(network, quantize_features=[INPUT])
    with pytest.raises(
        UserError, match="Named is given NoneType as its first positional argument, not a tensor of flo"
    ):
        compress(network, example, SCHEDULE, 1, 2, plan=plan)


def test_globs_reach_what_a_layer_is_given() -> None:
    network = Functional()
    plan = Plan.from_globs(network, quantize_features=["block.*", "!block.gate", "block.*.input", "!**.conv1.input"])
    expected = [f"block.{name}" for name in ("conv1", "bn1", "conv2", "bn2")]
    inputs = [f"block.{name}.input" for name in ("bn1", "conv2", "bn2", "gate")]
    assert [site.path for site in plan.active] == [*expected, *inputs]


def test_weights_that_something_else_computes_are_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(UserError) as error:
        compress(network, torch.randn(2, 3), SCHEDULE, 1, 2)
    assert str(error.value) == (
        "the weight of ParametrizedLinear is computed by _WeightNorm, as weight norms do, and cannot be compressed; "
        "make it a plain parameter first (torch.nn.utils.parametrize.remove_parametrizations, or "
        "torch.nn.utils.remove_weight_norm for the older kind), or exclude the layer"
    )
    assert not any("operators" in name for name, _ in network.named_modules())  # nothing half-done on features


def test_a_network_is_compressed_once() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    compress(network, torch.randn(2, 3), SCHEDULE, 1, 2, quantize=QuantizeConfig(targets="w"))
    with pytest.raises(UserError, match="a network is compressed once; begin from a fresh copy of it"):
        compress(network, torch.randn(2, 3), SCHEDULE, 1, 2, quantize=QuantizeConfig(targets="w"))


def test_weights_that_two_modules_share_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.hidden, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.hidden(self.embed(tokens)))

    plan = auto_plan(Tied(), torch.arange(6).reshape(2, 3) % 5)
    weights = {site.path: site.quantize for site in plan.sites if site.kind == "weight"}
    assert weights == {"hidden": True, "out": False}
    assert [s.path for s in plan.active if s.kind == "feature"] == ["embed", "hidden"]


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"the example passed no convolution, no linear layer and no attention: there is"
    ):
        compress(nn.Sequential(nn.Tanh()), torch.randn(2, 3), SCHEDULE, 1, 2)
