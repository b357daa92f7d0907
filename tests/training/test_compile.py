"""trainer.compile, pack_features and fuse_relu: which steps, how many graphs, the same bits where they are promised."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from qprune.compression import native as kernels
from qprune.compression.compressor import attach
from qprune.compression.config import QuantizeConfig
from qprune.compression.functional import GRADIENTS, ROUNDINGS, quantize
from qprune.compression.plan import Plan
from qprune.compression.schedule import Schedule
from qprune.config.compose import compose_run
from qprune.config.signature import signature
from qprune.errors import UserError
from qprune.training import compile as compiling
from qprune.training.distributed import launch
from qprune.training.optimizers import fuse
from tests.training.toy import prepared


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts graphs; they run by torch's own functions, so that no C++ compiler is needed and bits are the same."""
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def test_one_graph_per_kind_of_event(counter: CompileCounterWithBackend, tmp_path: Path) -> None:
    torch._dynamo.utils.counters.clear()
    _, compressor, trainer = prepared(tmp_path, compile=True)
    trainer.fit()
    timeline = compressor.timeline
    compiled = [step for step in range(trainer.steps) if compiling.is_compiled(timeline, step)]
    states = {compiling.state_of(timeline, step) for step in compiled}
    # float, pruned, weights quantized, all quantized: masks change three more times within one graph
    assert states == {(False, False, False), (True, False, False), (True, True, False), (True, True, True)}
    assert counter.frame_count == len(states)  # one graph each: no graph break, no other recompilation
    assert not torch._dynamo.utils.counters["graph_break"]
    assert trainer.ways.compile_seconds > 0


def test_a_compiled_run_trains_as_a_plain_one(counter: CompileCounterWithBackend, tmp_path: Path) -> None:
    plain, compiled = (prepared(tmp_path / f"{word}", compile=word) for word in (False, True))
    fuse(plain[2].optimizers)  # which rounds in another order
    assert compiled[2].fit() == plain[2].fit()
    assert counter.frame_count
    decimals = [[p.operator.decimal.tolist() for p in run[1].quantizers("feature")] for run in (plain, compiled)]
    assert decimals[0] == decimals[1]


def trained_by_a_rank(folder: Path) -> tuple[list[dict[str, float]], int]:
    counter = CompileCounterWithBackend("aot_eager")
    compiling.BACKEND = counter  # type: ignore[assignment]  # of this rank's own process
    metrics = []
    for compiled in (False, True):
        _, _, trainer = prepared(folder / str(compiled), compile=compiled)
        fuse(trainer.optimizers)
        metrics.append(trainer.fit())
    return metrics, counter.frame_count


def test_ranks_compile_too(tmp_path: Path) -> None:
    (plain, compiled), graphs = launch(2, trained_by_a_rank, tmp_path)
    assert compiled == plain
    assert graphs == 4  # as in one process


def test_steps_that_collect_and_short_batches_are_not_compiled() -> None:
    timeline = Schedule(t_qw=3, t_qf=4, t_p=0, dt_p=1, n=2).in_steps(10, 4, window=8, samples_per_epoch=38)
    assert [step for step in range(45) if not compiling.is_compiled(timeline, step)] == [
        *(7, 8, 9),  # the window of the first mask: 2 + 4 + 2 samples, with the epoch's short batch
        *(17, 18, 19),
        29,
        *(37, 38, 39),  # the window of the features' decimal bits
    ]


def test_operators_of_the_network_s_input_are_part_of_the_graph(counter: CompileCounterWithBackend) -> None:
    network = nn.Module()
    network.inner = nn.Conv2d(2, 2, 3)
    network.forward = lambda x: network.inner(x)  # type: ignore[method-assign, operator]
    timeline = Schedule(t_qw=0, t_qf=0).in_steps(3, 4, window=4, samples_per_epoch=10)
    x = torch.randn(4, 2, 5, 5)
    attach(
        network, Plan.from_globs(network, ["inner"], [], ["input"], []), timeline, x, None, QuantizeConfig(decimal=4)
    ).at(0)
    expected = network(x)
    compiling.compile_training(SimpleNamespace(network=network), {}, torch.device("cpu"))  # type: ignore[arg-type]
    assert torch.equal(network(x), expected)
    assert counter.frame_count == 1


def test_a_cpu_s_compiler_computes_nothing_twice() -> None:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func

    from qprune.training.inductor import KeepAsAutograd

    calls: dict[str, list[str]] = {}

    def noted(name: str) -> Callable[..., Any]:
        def compiler(graph: Any, _: Any) -> Any:
            calls[name] = [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph)

        return compiler

    def function(x: torch.Tensor) -> torch.Tensor:
        return quantize(x.tanh(), decimal=5).square()

    compiled = aot_function(function, noted("forward"), noted("backward"), partition_fn=KeepAsAutograd())
    x = torch.randn(20, requires_grad=True)
    compiled(x).sum().backward()
    gradient, x.grad = x.grad, None
    function(x).sum().backward()
    assert gradient is not None
    assert torch.equal(gradient, x.grad)  # type: ignore[arg-type]
    assert "tanh.default" in calls["forward"]
    assert "tanh_backward.default" in calls["backward"]
    assert "tanh.default" not in calls["backward"]


def counting_masks(function: Callable[..., torch.Tensor]) -> tuple[Callable[..., torch.Tensor], list[int]]:
    """`function` by way of the graphs that inductor is given, and how many masks were left out of them."""
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._inductor.decomposition import select_decomp_table

    from qprune.training import inductor

    counted: list[int] = []

    def partition(gm: Any, joint_inputs: Any, **options: Any) -> Any:
        counted.append(inductor.drop_masks_behind_relus(gm.graph))
        return inductor.KeepAsAutograd()(gm, joint_inputs, **options)

    def compiler(graph: Any, _: Any) -> Any:
        return make_boxed_func(graph)

    table = select_decomp_table()
    return aot_function(function, compiler, compiler, partition_fn=partition, decompositions=table), counted


@pytest.mark.parametrize(
    ("between", "dropped"),
    [
        ("relu", 1),
        ("clamp(min=0.5).relu", 0),  # no zeros are left
        ("tanh", 0),
        ("relu6", 0),  # could be, but is another function
        ("square", 0),
    ],
)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_masks_are_left_out_where_gradients_are_zero_anyway(between: str, dropped: int, rounding: str) -> None:
    torch.manual_seed(0)
    mask = (torch.rand(3, 5) > 0.5).float()
    decimal = torch.tensor(2, dtype=torch.int32)
    after = {
        "relu": torch.relu,
        "clamp(min=0.5).relu": lambda x: x.clamp(min=0.5).relu(),
        "tanh": torch.tanh,
        "relu6": nn.functional.relu6,
        "square": torch.square,
    }[between]

    def function(x: torch.Tensor, mask: torch.Tensor, decimal: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = after(quantize(x, 4, decimal, rounding=rounding, mask=mask))
        return out

    x = (torch.randn(7, 3, 5) * 3).requires_grad_()
    incoming = torch.randn(7, 3, 5) * 5
    compiled, counted = counting_masks(function)
    [gradient] = torch.autograd.grad(compiled(x, mask, decimal), x, incoming)
    [expected] = torch.autograd.grad(function(x, mask, decimal), x, incoming)
    assert counted == [dropped]
    if between == "tanh":  # inductor's gradient of it is not torch's to the last bit
        torch.testing.assert_close(gradient, expected)
    else:
        assert torch.equal(gradient, expected)
    assert (expected == 0).any()


def test_a_factor_that_is_no_mask_stays() -> None:
    compiled, counted = counting_masks(lambda x, factor: quantize((x * factor).relu(), decimal=4).relu())
    x, factor = torch.ones(3, requires_grad=True), torch.tensor([0.5, 2.0, 3.0])
    compiled(x, factor).sum().backward()
    assert counted == [0]
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 2.0, 3.0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_compiled_quantization_has_the_same_bits(gradient: str, rounding: str, masked: bool) -> None:
    torch.manual_seed(0)
    mask = (torch.rand(3, 5) > 0.5).float() if masked else None
    decimal = torch.tensor(2, dtype=torch.int32)
    x, incoming = (torch.randn(7, 3, 5) * 3).requires_grad_(), torch.randn(7, 3, 5) * 5

    def function(x: torch.Tensor) -> torch.Tensor:
        return quantize(x, 4, decimal, rounding, gradient, mask=mask)

    torch._dynamo.reset()
    out, compiled = function(x), torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(out, compiled)
    [expected] = torch.autograd.grad(out, x, incoming)
    [found] = torch.autograd.grad(compiled, x, incoming)
    assert torch.equal(expected, found)
    assert expected.any()


def test_gradients_of_depthwise_convolutions_are_not_laid_out_anew() -> None:
    from torch._inductor.utils import run_fw_bw_and_get_code

    from qprune.training.inductor import options_on_a_cpu

    torch.compiler.reset()
    sizes: list[dict[str, Any]] = [
        {"in_channels": 4, "out_channels": 8, "kernel_size": 1},
        {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "groups": 8},
        {"in_channels": 8, "out_channels": 4, "kernel_size": 1},
    ]
    network = nn.Sequential(*[nn.Conv2d(**size, bias=False) for size in sizes])
    network.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    _, (_, backward) = run_fw_bw_and_get_code(lambda: torch.compile(network, options=options_on_a_cpu())(x))
    assert backward.count("= torch.ops.aten.convolution_backward.default(") == 3
    assert "cpp_fused" not in backward  # nothing but convolutions: a copy would be one


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(3, 4, 3)],
    ids=lambda layer: type(layer).__name__,
)
def test_gradients_of_biases_are_sums_of_their_own(layer: nn.Module) -> None:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch.func import functional_call

    from qprune.training.inductor import KeepAsAutograd

    graphs: list[torch.fx.Graph] = []

    def compiler(graph: Any, _: Any) -> Any:
        graphs.append(graph.graph)
        return make_boxed_func(graph)

    def function(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        hidden = functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        out: torch.Tensor = torch.tanh(hidden)
        return out

    torch.manual_seed(0)
    inputs = [*(each.detach().double() for each in layer.parameters())]
    inputs.append(torch.randn(2, 3, *[7] * (inputs[0].dim() - 2), dtype=torch.float64))
    for each in inputs:
        each.requires_grad_()
    compiled = aot_function(function, compiler, compiler, partition_fn=KeepAsAutograd())
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    aten = torch.ops.aten
    [backward] = graphs[1].find_nodes(op="call_function", target=aten.convolution_backward.default)
    assert backward.args[-1] == [True, True, False]
    [total] = graphs[1].find_nodes(op="call_function", target=aten.sum.dim_IntList)
    assert total.args[0] is backward.args[0]


def test_compiled_graphs_can_be_stored() -> None:
    from torch._inductor import list_options

    from qprune.training.inductor import options_on_a_cpu

    options = options_on_a_cpu()
    assert set(options) <= set(list_options())
    assert (
        pickle.loads(pickle.dumps(options))["custom_partitioner_fn"].uuid() == options["custom_partitioner_fn"].uuid()
    )


def test_graphs_with_operators_are_kept_for_a_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch import config
    from torch._inductor.utils import fresh_cache

    monkeypatch.setattr(config, "autograd_cache_allow_custom_autograd_functions", False)  # what it is before and after
    network = nn.Tanh()
    task = SimpleNamespace(network=network)
    x = torch.linspace(-3, 3, 50)
    hits = torch._dynamo.utils.counters["aot_autograd"]
    hits.clear()

    def gradient_of(gradient: str) -> torch.Tensor:
        torch._dynamo.reset()
        network.forward = lambda x: quantize(4 * x, 4, 2, gradient=gradient).square()  # type: ignore[method-assign]
        compiling.compile_training(task, {}, torch.device("cpu"))  # type: ignore[arg-type]
        leaf = x.clone().requires_grad_()
        [found] = torch.autograd.grad(network(leaf).sum(), leaf)
        return found

    with fresh_cache():
        first = {gradient: gradient_of(gradient) for gradient in ("clip_value", "in_range")}
        assert hits["autograd_cache_miss"] == 2  # graphs that differ backward alone are two
        again = {gradient: gradient_of(gradient) for gradient in first}
        assert hits["autograd_cache_hit"] == 2
    torch._dynamo.reset()
    for gradient, found in first.items():
        leaf = x.clone().requires_grad_()
        [expected] = torch.autograd.grad(quantize(4 * leaf, 4, 2, gradient=gradient).square().sum(), leaf)
        torch.testing.assert_close(found, expected)
        assert torch.equal(again[gradient], found)
    assert not torch.equal(first["clip_value"], first["in_range"])


def test_only_what_may_change_is_asked_before_a_step() -> None:
    torch._dynamo.reset()
    left_out: list[str] = []

    def noted(guards: Sequence[Any]) -> list[bool]:
        kept = compiling.guards_of_a_run(guards)
        left_out.extend(guard.guard_type for guard, keep in zip(guards, kept, strict=True) if not keep)
        return kept

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda layer, x: torch.tanh(layer(x)) * layer.padding[0],
        backend=counter,
        dynamic=False,
        options={"guard_filter_fn": noted},
    )
    layer, x = nn.Conv1d(2, 2, 3), torch.randn(1, 2, 9)
    for _ in range(2):
        compiled(layer, x)
    assert counter.frame_count == 1
    assert "MODULE_MATCH" in left_out
    layer.padding = (1,)  # a value
    assert compiled(layer, x).shape == (1, 2, 9)
    layer.weight.data.zero_()
    layer.bias = None  # a tensor; the values of one are no matter of the graph
    assert not compiled(layer, x).any()
    assert counter.frame_count == 3
    torch._dynamo.reset()


def test_optimizers_are_fused(counter: CompileCounterWithBackend, tmp_path: Path) -> None:
    task, _, _ = prepared(tmp_path, compile=True)
    assert [group["fused"] for group in task.optimizer.param_groups] == [True]


def test_packed_features_change_no_bit(tmp_path: Path) -> None:
    plain, packed = (prepared(tmp_path / f"{word}", pack_features=word) for word in (False, True))
    assert plain[2].fit() == packed[2].fit()
    for name, value in plain[0].state_dict().items():
        assert torch.equal(packed[0].state_dict()[name], value), name


def test_fused_relus_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_library", kernels._library)  # for this test alone
    if not kernels.load():
        pytest.skip("no C compiler here makes the kernels")
    plain, fused = (prepared(tmp_path / f"{word}", fuse_relu=word) for word in (False, True))
    assert plain[2].fit() == fused[2].fit()
    assert fused[2].ways._rectified, "the toy has a feature that a ReLU alone reads"
    for name, value in plain[0].state_dict().items():
        assert torch.equal(fused[0].state_dict()[name], value), name


def test_both_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainer.compile=true and trainer.pack_features=true exclude each other"):
        prepared(tmp_path, compile=True, pack_features=True)


def test_only_compiling_and_layout_make_another_run() -> None:
    def named(*overrides: str) -> str:
        return signature(compose_run(("task=espcn", *overrides)))

    assert named() == named("trainer.kernels=false", "trainer.warm_start=false") == named("trainer.compile=false")
    assert len({named(), named("trainer.compile=true"), named("trainer.channels_last=true")}) == 3
    assert named("trainer.channels_last=null") == named()
    older = compose_run(("task=espcn",)).plain()
    del older["trainer"]["compile"], older["trainer"]["channels_last"]
    assert signature(older) == named()  # rows from before the keys
