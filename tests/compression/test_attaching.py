"""What `compress` does to a network and says about it: all or nothing, a summary, and networks out of the ordinary."""

import threading
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qprune
from qprune import Plan, PruneConfig, QuantizeConfig, Schedule, Site, UserError, compress

SCHEDULE = Schedule(t_p=0, dt_p=1, n=4, t_qw=5, t_qf=6)
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def layers(*inner: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), *(inner or (nn.Linear(4, 4),)), nn.ReLU(), nn.Linear(4, 2))


def train(network: nn.Module, compressor: qprune.Compressor, steps: int = 8, x: Tensor = X, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        compressor.at(step)
        network.train()
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


class First(nn.Module):
    def forward(self, given: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        return given[0] if isinstance(given, tuple) else given


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x


WEIGHTS = [Site("0", "weight", False, True), Site("input", "feature", False, True), Site("2", "weight", False, True)]


COMPUTED = (
    "2: the weight of Linear is computed by _WeightNorm, as weight norms do, and cannot be compressed; make it a plain "
    "parameter first (torch.nn.utils.parametrize.remove_parametrizations, or torch.nn.utils.remove_weight_norm for the "
    "older kind), or exclude the layer"
)


def snapshot(network: nn.Module) -> list[object]:
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in network.modules()]
    return [
        list(network.state_dict()),
        [(name, id(parameter)) for name, parameter in network.named_parameters()],
        [(name, type(module), module.training) for name, module in network.named_modules()],
        [(list(after), list(before)) for after, before in hooks],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize(
    ("build", "plan", "said"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), WEIGHTS, COMPUTED),
        (
            lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
            WEIGHTS,
            "2: the weight of Linear is computed by a hook, as weight norms",
        ),
        (
            Pair,
            [Site("0", "weight", True, True), Site("0", "feature", True, True), Site("2", "feature", True)],
            "2: Pair returns tuple, not a tensor, and cannot be a site; name a module inside it, or the layer that",
        ),
        (
            lambda: nn.Linear(4, 4),
            [Site("0", "weight", True), Site("5.input", "feature", True), Site("nowhere", "feature", True)],
            "nowhere: there is no such module",
        ),
        (
            Unused,
            [Site("0", "weight", False, True), Site("2.unused", "feature", True)],
            "the operator at '2.unused' never fires in one pass of the example; take the site out of the plan",
        ),
    ],
    ids=["weight norm", "older weight norm", "tuple", "no module", "never fires"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_compress_that_raises_leaves_the_network_as_it_was(
    build: Callable[[], nn.Module], plan: list[Site], said: str
) -> None:
    network = layers(build(), First())
    network[1].eval()
    before = snapshot(network)
    expected = network(X)
    with pytest.raises(UserError) as error:
        compress(network, X, SCHEDULE, 1, 4, plan=Plan(tuple(plan)))
    assert str(error.value).startswith(said)
    assert snapshot(network) == before
    assert torch.equal(network(X), expected)


def test_operators_that_were_placed_by_hand_before_stay_when_compress_raises() -> None:
    network = layers()
    qprune.Pruner(0.5).on(network[2])
    before = snapshot(network)
    plan = Plan((Site("2", "weight", False, True), Site("0", "weight", True), Site("nowhere", "feature", True)))
    with pytest.raises(UserError, match="nowhere: there is no such module"):
        compress(network, X, SCHEDULE, 1, 4, plan=plan)
    assert snapshot(network) == before


def test_the_advice_of_an_error_can_be_followed() -> None:
    network = layers(parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(UserError, match="or exclude the layer"):
        compress(network, X, SCHEDULE, 1, 4, plan=Plan.from_globs(network, ["**"]))
    compress(network, X, SCHEDULE, 1, 4, exclude=["2"])
    said = qprune.coverage(network, X)
    assert said.names("weight") == ["2.weight", "2.weight"]  # magnitude and direction
    assert said.tensors[0].reason.startswith("Linear computes another weight from it (weight_norm_interface) and")
    nn.utils.parametrize.remove_parametrizations(network[2], "weight")
    assert qprune.coverage(network, X).names("weight") == ["2.weight"]


def test_print_is_a_summary() -> None:
    compressor = compress(layers(), X, SCHEDULE, 1, 4)
    # weights: 12 + 8 elements at 8 bits, 16 at 4; features: 12 of the input and 16 at 8 bits, 16 at 4
    assert str(compressor) == (
        "weights: 3 of 3 compressed, 100.0% of the elements; 0.00115 Mb become 0.000224 Mb\n"
        "features: 3 of 4 compressed, 100.0% of the elements; 0.00141 Mb become 0.000288 Mb\n"
        "not compressed: 0 of 3 weights, 1 of 4 features\n"
        "  feature 4, 8 elements: the network's result"
    )
    by_hand = layers()
    qprune.Quantizer(8).on(qprune.Pruner(0.5).on(by_hand[2]))
    assert str(qprune.Compressor(by_hand, SCHEDULE.in_steps(1, 4), X)) == "weights: 2 operators\nfeatures: 0 operators"


def test_less_than_half_is_a_warning() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(50, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.table(ids)))

    with pytest.warns(UserWarning, match="most elements stay float: weights: 2 of 3 compressed, 10.7% of the elem"):
        compress(Table(), torch.arange(8).reshape(4, 2), SCHEDULE, 1, 4)

    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).exp()
            return self.last((y.cumsum(1) + y.cumsum(0) + y.sort(1).values).softmax(-1) @ torch.eye(4))

    with pytest.warns(UserWarning, match="most elements stay float: features: "):
        compress(Functions(), X, SCHEDULE, 1, 4)
    with warnings.catch_warnings(action="error"):  # nothing is wanted of features
        targets = {"prune": PruneConfig(targets="w"), "quantize": QuantizeConfig(targets="w")}
        compress(Functions(), X, SCHEDULE, 1, 4, **targets)


@pytest.mark.parametrize("first_call", ["before", "after"])
def test_a_compiled_network_is_compressed(first_call: str) -> None:
    torch._dynamo.reset()
    network = layers()
    compiled = torch.compile(network, backend="eager")
    if first_call == "before":
        compiled(X)
    compressor = compress(compiled, X, SCHEDULE, 1, 4)
    assert {p.path for p in compressor.quantizers("feature")} == {"input", "0", "2"}
    train(network, compressor)
    compiled.eval()
    assert torch.equal(compiled(X), network(X))
    assert torch.equal(compressor.convert()(X), network(X))
    assert list(dict(compressor.convert().named_parameters())) == list(layers().state_dict())


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 8), (torch.bfloat16, 12)])
def test_types_that_do_not_hold_the_grid_are_refused(dtype: torch.dtype, bits: int) -> None:
    network = layers(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    with pytest.raises(UserError, match=rf"0.weight is of {dtype}, which does not hold a grid of {bits} bits; keep "):
        compress(network, X.to(dtype), SCHEDULE, 1, 4, quantize=QuantizeConfig(bits))
    compressor = compress(network, X.to(dtype), SCHEDULE, 1, 4, PruneConfig(), None)
    train(network, compressor, x=X.to(dtype))
    assert compressor.sparsity["weight"] == 0.5


@pytest.mark.parametrize("held", [threading.Lock, lambda: torch.ones(2, requires_grad=True) * 2], ids=["lock", "graph"])
def test_a_network_that_cannot_be_copied_trains_and_says_what_to_do(held: Callable[[], object]) -> None:
    network = layers()
    network.held = held()  # type: ignore[assignment]
    compressor = compress(network, X, SCHEDULE, 1, 4)
    train(network, compressor)
    with pytest.raises(UserError, match="Sequential cannot be copied, and convert works on a copy: .*Detach tensors"):
        compressor.convert()
    network.held = None  # type: ignore[assignment]
    network.eval()
    assert torch.equal(compressor.convert()(X), network(X))


def test_zeros_of_a_sparse_network_are_kept() -> None:
    network = layers(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    prune.l1_unstructured(network[2], "weight", 0.75)
    prune.l1_unstructured(network[4], "weight", 0.25)
    with pytest.raises(UserError) as error:
        compress(network, X, SCHEDULE, 1, 4)
    assert str(error.value) == (
        "2: the weight of Linear is masked by torch.nn.utils.prune; make it plain, "
        "torch.nn.utils.prune.remove(layer, 'weight'), and keep its zeros, PruneConfig(keep_zeros=True)"
    )
    for layer in (network[2], network[4]):
        prune.remove(layer, "weight")
    zeros = [network[i].weight == 0 for i in (2, 4)]
    compressor = compress(network, X, SCHEDULE, 1, 4, PruneConfig(0.5, "w", keep_zeros=True), QuantizeConfig())
    for step in range(8):
        compressor.at(step)
        network.train()
        network(X).square().mean().backward()
        with torch.no_grad():  # an optimizer that moves pruned weights too
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.01)
        for i, zero in zip((2, 4), zeros, strict=True):
            assert not network[i].weight[zero].any()
    assert [p.operator.density for p in compressor.pruners("weight")] == [0.25, 0.5]
    again = layers(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    compress(again, X, SCHEDULE, 1, 4, PruneConfig(0.5, "w", keep_zeros=True), QuantizeConfig())
    again.load_state_dict(network.state_dict())
    network.eval(), again.eval()
    assert torch.equal(again(X), network(X))
    assert torch.equal(compressor.convert()(X), network(X))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused_by_hand_and_reported(kind: type[nn.LSTM]) -> None:
    name = kind.__name__
    with pytest.raises(UserError, match=f"{name} reads its weights past all operators; build it of {name}Cell, whose"):
        qprune.Quantizer(8).on(kind(3, 4), "weight_ih_l0")

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(3, 9), kind(9, 4, batch_first=True), nn.Linear(4, 9)
            self.last = nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.head(self.inner(self.first(x))[0]))

    network = Reader()
    example = torch.randn(4, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an LSTM's weights are more than half
        compressor = compress(network, example, SCHEDULE, 1, 4)
    assert {p.path for p in compressor.placed if p.kind == "weight"} == {"first", "head", "last"}
    said = {t.name: t.reason for t in qprune.coverage(network, example).tensors if t.kind == "weight"}
    assert said.keys() == {"inner.weight_ih_l0", "inner.weight_hh_l0"}
    assert set(said.values()) == {
        f"{name} reads its weights past all operators; build it of {name}Cell, whose weights take operators"
    }


def test_recurrent_cells_take_operators_by_hand() -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = (x.new_zeros(len(x), 4), x.new_zeros(len(x), 4))
            for now in x.unbind(1):
                state = self.cell(now, state)
            return self.head(state[0])

    network = Cells()
    for name in ("weight_ih", "weight_hh"):
        qprune.Quantizer(8).on(qprune.Pruner(0.5).on(network.cell, name), name)
    x = torch.randn(4, 5, 3)
    compressor = qprune.Compressor(network, SCHEDULE.in_steps(1, 4), x)
    train(network, compressor, x=x)
    network.eval()
    assert torch.equal(compressor.convert()(x), network(x))
    assert compressor.sparsity["weight"] == 0.5
    assert qprune.coverage(network, x).names("weight") == ["head.weight"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: QuantizeConfig(decimal=200),
        lambda: qprune.Quantizer(8, [3, 200]),
        lambda: qprune.fake_quantize(X, decimal=200),
    ],
)
def test_fraction_bits_without_an_exact_power_of_two_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="decimal=200 is not a number of fraction bits from -100 to 100"):
        build()


@pytest.mark.parametrize("example", [X[:0], (torch.empty(0, 3),), {"x": X[:0]}, ([],)])
def test_an_empty_example_is_refused(example: object) -> None:
    network = layers()
    before = snapshot(network)
    with pytest.raises(UserError, match="the example holds no samples; give one batch as training does"):
        compress(network, example, SCHEDULE, 1, 4)
    assert snapshot(network) == before


@pytest.mark.parametrize("saturate", [(0.0, 1.0), (0.01, 0.99)])
def test_empty_batches_change_nothing(saturate: tuple[float, float]) -> None:
    found = []
    for empty in (False, True):
        network = layers()
        options = PruneConfig(window=8), QuantizeConfig(saturate=saturate)
        compressor = compress(network, X, SCHEDULE, 1, 4, *options)
        for step in range(8):
            compressor.at(step)
            network.train()
            if empty:
                assert network(X[:0]).shape == (0, 2)
            network(X)
            if empty:
                network(X[:0]).sum().backward()
        found.append(compressor.describe())
    assert found[0] == found[1]


class Alive(TorchDispatchMode):
    """The largest number of bytes in storages that are alive at once, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.seen:
                    self.seen.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, storage.data_ptr(), storage.nbytes())
        return out

    def gone(self, address: int, size: int) -> None:
        self.now -= size
        self.seen.discard(address)


def test_attaching_takes_no_more_memory_than_a_training_step() -> None:
    network, pictures = torchvision.models.mobilenet_v2(), torch.randn(8, 3, 64, 64)
    with Alive() as step:
        network(pictures).sum().backward()
    network.zero_grad(set_to_none=True)
    with Alive() as attaching:
        compressor = compress(network, pictures, SCHEDULE, 1, 8)
    assert len(compressor.placed) > 150
    assert attaching.most < step.most
