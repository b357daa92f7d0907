"""Networks that were not written for compression: what is found, what is left alone, and what is said about it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qprune
from qprune.compression.auto_plan import auto_plan
from qprune.compression.compressor import Compressor, compress
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.plan import INPUT, Plan
from qprune.compression.prepare import find_operators
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
    assert [s.path for s in plan.sites if not (s.prune or s.quantize)] == ["block.conv1", "block.conv2", "head"]
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


@pytest.mark.filterwarnings("ignore:most elements stay float. features")  # within torch's own encoder
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


@pytest.mark.filterwarnings("ignore:most elements stay float. features")
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
    with pytest.raises(UserError, match=r"a feature of shape \(5, 4\) reached a pruner with a mask of \(6, 4\); give"):
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
    with pytest.raises(UserError, match="Named is given NoneType as its first positional argument, not a tensor of fl"):
        compress(network, example, SCHEDULE, 1, 2, plan=plan)


def test_globs_reach_what_a_layer_is_given() -> None:
    network = Functional()
    plan = Plan.from_globs(network, quantize_features=["block.*", "!block.gate", "block.*.input", "!**.conv1.input"])
    expected = [f"block.{name}" for name in ("conv1", "bn1", "conv2", "bn2")]
    inputs = [f"block.{name}.input" for name in ("bn1", "conv2", "bn2", "gate")]
    assert [site.path for site in plan.active] == [*expected, *inputs]


def test_a_network_is_compressed_once() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    options = {"prune": PruneConfig(targets="w"), "quantize": QuantizeConfig(targets="w")}
    compress(network, torch.randn(2, 3), SCHEDULE, 1, 2, **options)
    with pytest.raises(UserError, match="a network is compressed once; begin from a fresh copy of it"):
        compress(network, torch.randn(2, 3), SCHEDULE, 1, 2, **options)


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


def test_a_module_under_two_names_is_left_alone() -> None:
    twice = nn.Linear(4, 4)
    network = nn.Sequential(nn.Linear(4, 4), twice, nn.ReLU(), twice, nn.Linear(4, 2))
    compressor = compress(network, torch.randn(3, 4), SCHEDULE, 1, 3)
    assert {p.path for p in compressor.quantizers("weight")} == {"0", "4"}
    assert "weight 1.weight, 16 elements: shared with 3, and no operator fits both" in str(compressor)


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="the example passed no convolution, no linear layer and no attention: there"):
        compress(nn.Sequential(nn.Tanh()), torch.randn(2, 3), SCHEDULE, 1, 2)


class Pictures(nn.Module):
    """Bytes in, by its own conversion; any of the inputs below goes through `body`."""

    def __init__(self, given: int = 3) -> None:
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(given, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)

    def body(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.act(self.conv1(x))).mean((2, 3)))

    def forward(self, bytes_: Tensor) -> Tensor:
        return self.body(bytes_.float() / 255)


class ListOfPictures(Pictures):
    """Pads pictures of several sizes into one batch, as detectors do."""

    def forward(self, pictures: list[Tensor]) -> Tensor:  # type: ignore[override]
        batch = pictures[0].new_zeros(len(pictures), 3, 16, 16)
        for place, picture in zip(batch, pictures, strict=True):
            place[:, : picture.shape[1], : picture.shape[2]].copy_(picture)
        return self.body(batch)


class Named(Pictures):
    def forward(self, given: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.body(given["x"] * given["scale"])


class WithTable(Pictures):
    """A table, or a number, comes first, then the pictures."""

    def forward(self, table: Tensor, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.body(x) + y + table.sum()


class OneHot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.second(self.act(self.first(F.one_hot(ids, 7).float()))))


class Bags(OneHot):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(10, 7)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        return self.last(self.second(self.act(self.first(self.table(ids, offsets)))))


X = PICTURES[:, :, :16, :16]
OF_PICTURES = {"conv1.input": (False, True), "conv1": (False, True), "conv2": (True, True), "head.input": (False, True)}
OF_TABLE = {"first.input": (False, True), "first": (False, True), "second": (True, True)}


@pytest.mark.parametrize(
    ("network", "example", "expected"),
    [
        (Pictures(), torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), OF_PICTURES),
        (ListOfPictures(), ([torch.rand(3, 16, 12), torch.rand(3, 10, 16)],), OF_PICTURES),
        (Named(), ({"x": X, "scale": torch.tensor(2.0)},), OF_PICTURES),
        (WithTable(), (torch.rand(9, 5), X, torch.rand(4, 2)), OF_PICTURES),
        (WithTable(), (torch.tensor(0.5), X, torch.rand(4, 2)), OF_PICTURES),
        (OneHot(), torch.arange(5) % 7, OF_TABLE),
        (Bags(), (torch.arange(10), torch.tensor([0, 2, 6])), {"table": (False, True)} | OF_TABLE),
    ],
    ids=["bytes", "list", "dict", "table", "number", "one-hot", "bags"],
)
def test_inputs_that_are_not_one_float_tensor(network: nn.Module, example: object, expected: dict[str, object]) -> None:
    if isinstance(network, Bags):
        expected = {name: found for name, found in expected.items() if name != "first.input"}
    assert features(network, example) == expected
    compressor = compress(network, example, SCHEDULE, 1, 4, include=["**"], exclude=[])
    arguments = example if isinstance(example, tuple) else (example,)
    for step in range(8):
        compressor.at(step)
        network.train()
        network(*arguments)
    network.eval()
    assert torch.equal(compressor.convert()(*arguments), network(*arguments))
    stored = qprune.actual_footprint(network, example).entries
    assert sum(e.bits == 8 for e in stored if e.kind != "weight") == len(expected)


def test_an_example_that_does_not_show_its_samples_is_refused_until_they_are_given() -> None:
    class Graph(OneHot):
        def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:  # type: ignore[override]
            return self.last(self.second(self.act(self.first(nodes.index_add(0, edges[0], nodes[edges[1]]))))).sum()

    example = (torch.rand(6, 7), torch.randint(0, 6, (2, 9)))
    with pytest.raises(UserError, match="the example does not show how many samples it holds, .* for example samples"):
        compress(Graph(), example, SCHEDULE, 1, 6)
    network = Graph()
    compress(network, example, SCHEDULE, 1, 6, samples=6)
    assert {p.path for p in find_operators(network)} == {"first", "second", "last", INPUT, "first.input"}
    assert qprune.coverage(network, example, samples=6).tensors[0].reason.startswith("made by index in the forward of")


class Standardized(nn.Conv2d):
    """Weight standardization (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias)


class Equalized(nn.Linear):
    """Equalized learning rate (Karras et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3, self.bias)


class Masked(nn.Conv2d):
    """Causal convolution: a mask of zeros and ones keeps the grid."""

    mask: Tensor

    def __init__(self, given: int, made: int) -> None:
        super().__init__(given, made, 3)
        self.register_buffer("mask", torch.ones(3, 3).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias)


@pytest.mark.filterwarnings("ignore:most elements stay float. weights")
@pytest.mark.parametrize(
    ("layer", "example", "function"),
    [(Standardized(4, 4, 3), torch.randn(2, 4, 8, 8), "mean, sub, var"), (Equalized(4, 4), torch.randn(2, 4), "mul")],
)
def test_weights_that_a_layer_changes_are_not_taken_and_said(layer: nn.Module, example: Tensor, function: str) -> None:
    ends = [nn.Conv2d(4, 4, 1) if example.dim() == 4 else nn.Linear(4, 4) for _ in range(3)]
    network = nn.Sequential(ends[0], layer, ends[1], ends[2])
    compress(network, example, SCHEDULE, 1, 2)
    assert not hasattr(layer, "parametrizations")
    [said] = [t for t in qprune.coverage(network, example).tensors if t.kind == "weight"]
    assert said.name == "1.weight"
    assert said.reason.startswith(f"{type(layer).__name__} computes another weight from it ({function})")
    # Operators that are placed by hand all the same do not count as compressed.
    by_hand = nn.Sequential(ends[0], layer, ends[1], ends[2])
    qprune.Quantizer(8).on(layer)
    assert qprune.coverage(by_hand, example).names("weight") == ["1.weight"]


def test_a_weight_that_is_masked_in_the_forward_is_given_on_its_grid() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Masked(4, 4), nn.Conv2d(4, 4, 3))
    trained(network, PICTURES)
    given: list[Tensor] = []
    with _GivenTo("convolution", given):
        network.eval()(PICTURES)
    assert qprune.coverage(network, PICTURES).names("weight") == []
    decimal = network[1].parametrizations.weight[1].decimal.view(1, -1, 1, 1)
    on_grid = given[1] * 2.0**decimal
    assert torch.equal(on_grid, on_grid.round())


class _GivenTo(TorchDispatchMode):
    """Collects the second argument of a function of torch."""

    def __init__(self, function: str, given: list[Tensor]) -> None:
        super().__init__()
        self.function, self.given = function, given

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ == self.function:
            self.given.append(args[1])
        return func(*args, **(kwargs or {}))


class Conv1D(nn.Module):
    """GPT-2's linear layer."""

    def __init__(self, made: int, given: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(given, made)), nn.Parameter(torch.zeros(made))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Kernel(nn.Module):
    """A linear layer of a user's own, under a name of its own."""

    def __init__(self, made: int, given: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(made, given))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel).relu()


class Twofold(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


@pytest.mark.parametrize(("layer", "site"), [(Conv1D(5, 4), "1"), (Kernel(5, 4), "1.kernel"), (Twofold(4, 4, 5), "1")])
def test_products_with_a_parameter_are_layers(layer: nn.Module, site: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(5, 5), nn.Linear(5, 2))
    example = torch.randn(6, 3)
    plan = auto_plan(network, example)
    assert sorted(s.path for s in plan.active if s.kind == "weight") == sorted(["0", "2", "3", site])
    assert Plan.from_globs(network, [site]).active[0].path == site
    assert ("feature of 1: prune then quantize") in str(plan).splitlines()
    compressor = trained(network, example)
    network.eval()
    assert torch.equal(compressor.convert()(example), network(example))
    assert qprune.coverage(network, example).names("weight") == []
    weight = getattr(compressor.convert()[1], site.partition(".")[2] or "weight")
    assert 0.5 <= float((weight == 0).float().mean()) < 0.7


def test_layers_of_other_kinds_may_be_first_and_last() -> None:
    network = nn.Sequential(Kernel(4, 3), nn.Linear(4, 4), Conv1D(2, 4))
    plan = auto_plan(network, torch.randn(5, 3))
    assert {s.path: s.prune for s in plan.sites if s.kind == "weight"} == {"1": True, "2": False, "0.kernel": False}


class Siamese(nn.Module):
    """One encoder for two pictures, which may be of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean((2, 3)) - self.encoder(y).mean((2, 3)))


class Pyramid(nn.Module):
    """A head that all levels of a pyramid share."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2)])
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.levels[0](x)
        second = self.levels[1](first)
        return [self.head(first), self.head(second)]


def test_modules_that_are_called_several_times_have_one_set_of_decimals_and_one_mask() -> None:
    example = (PICTURES, PICTURES + 1)
    network = Siamese()
    found = features(network, example)
    assert found["encoder.1"] == (False, True)
    assert found["encoder.3"] == (True, True)
    compressor = compress(network, example, SCHEDULE, 1, 4, PruneConfig(window=4))
    for step in range(8):
        compressor.at(step)
        network.train()
        network(*example)
    pruner, quantizer = network.encoder[3].output_operators.pruner, network.encoder[3].output_operators.quantizer
    assert pruner.density == 0.5
    network.eval()
    converted = compressor.convert()
    made: list[Tensor] = []
    network.encoder[3].register_forward_hook(lambda _m, _a, out: made.append(out))
    assert torch.equal(converted(*example), network(*example))
    for each in made:
        on_grid = each * 2.0**quantizer.decimal
        assert torch.equal(on_grid, on_grid.round())
        assert torch.equal(each * pruner.mask, each)
    assert "one set of decimals and one mask for all calls: encoder.1 (2 calls), encoder.3 (2 calls)" in str(compressor)
    assert qprune.coverage(network, example).names("feature") == ["input", "head"]


def test_calls_of_several_sizes_have_no_mask_per_element() -> None:
    network = Pyramid()
    found = features(network, PICTURES)
    assert found == {INPUT: (False, True), "levels.0": (False, True), "levels.1": (True, True), "head.0": (False, True)}
    plan = Plan.from_globs(network, prune_features=["head.0"])
    with pytest.raises(UserError, match="'head.0' is called 2 times, with features of 2 sizes, which one mask does no"):
        compress(network, PICTURES, SCHEDULE, 1, 4, plan=plan)
    compressor = compress(network, PICTURES, SCHEDULE, 1, 4, PruneConfig(granularity="channel"), None, plan=plan)
    for step in range(8):
        compressor.at(step)
        network.train()
        network(PICTURES)
    assert compressor.sparsity["feature"] == 0.5


def test_an_activation_that_is_reused_gives_each_layer_its_own_site() -> None:
    act = nn.GELU()
    network = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))
    assert features(network, torch.randn(2, 3)) == {
        INPUT: (False, True),
        "2.input": (False, True),
        "4.input": (True, True),
    }


def test_a_module_called_input_is_not_the_network_s_input() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.act, self.output = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.output(self.act(self.input(x))))

    assert features(Both(), torch.randn(2, 3)) == {
        ".input": (False, True),
        "input": (False, True),
        "output": (True, True),
    }
    nested = nn.Sequential(nn.Linear(3, 3), Both())
    assert "1.input" in features(nested, torch.randn(2, 3))
    network = Both()
    compressor = trained(network, torch.randn(2, 3))
    assert {p.path for p in compressor.quantizers("feature")} == {".input", "input", "output"}
    plan = Plan.from_globs(Both(), quantize_features=["input", "output.input", ".input"])
    assert [site.path for site in plan.active] == [".input", "input", "output.input"]
