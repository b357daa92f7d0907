"""trainer.compile and channels_last: which steps are compiled, how many graphs, and the same bits where promised."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qprune.compression.compressor import attach
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.fake_quantize import FakeQuantize, Grid
from qprune.compression.functional import GRADIENTS, ROUNDINGS, fake_quantize
from qprune.compression.plan import Plan
from qprune.compression.schedule import Schedule
from qprune.config.compose import compose_run
from qprune.config.signature import signature
from qprune.training import compile as compiling
from tests.training.toy import Toy, prepared

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def counting(graphs: list[int]) -> Callable[..., Any]:
    """Return a backend that counts graphs; torch's own functions run them: no compiler, and the same bits."""

    def backend(module: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(1)
        return module.forward

    return backend


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one with every graph that is made."""
    torch.compiler.reset()
    limit = torch.compiler.config.recompile_limit
    made: list[int] = []
    monkeypatch.setattr(compiling, "BACKEND", counting(made))
    yield made
    torch.compiler.reset()
    torch.compiler.config.recompile_limit = limit


def test_a_compiled_run_trains_as_an_eager_one_with_a_graph_per_event(graphs: list[int], tmp_path: Path) -> None:
    eager, compiled = (prepared(tmp_path / f"{word}", compile=word) for word in (False, True))
    compiling.fuse(eager[2].optimizers.values())  # which rounds in another order
    assert compiled[2].fit() == eager[2].fit()
    for name, value in eager[0].state_dict().items():
        assert torch.equal(compiled[0].state_dict()[name], value), name
    timeline = compiled[1].timeline
    steps = [step for step in range(compiled[2].steps) if compiling.is_compiled(timeline, step)]
    modes = {compiling.active_modes(timeline, step) for step in steps}
    # float, pruned, weights quantized, all quantized: masks change three more times within one graph
    assert modes == {(False, False, False), (True, False, False), (True, True, False), (True, True, True)}
    assert len(graphs) == len(modes)  # one graph each: no graph break, no other recompilation
    assert compiled[2].compiled is not None
    assert compiled[2].compiled.seconds > 0


def eager_and_compiled() -> tuple[list[dict[str, float]], int]:
    """The metrics of a run without and with compilation, and the number of graphs; in a rank's own process."""
    graphs: list[int] = []
    compiling.BACKEND = counting(graphs)  # type: ignore[assignment]
    metrics = []
    for compiled in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            _, _, trainer = prepared(Path(folder), compile=compiled)
            compiling.fuse(trainer.optimizers.values())
            metrics.append(trainer.fit())
    return metrics, len(graphs)


def test_steps_that_collect_and_short_batches_are_not_compiled() -> None:
    timeline = Schedule(t_qw=3, t_qf=4, t_p=0, dt_p=1, n=2).in_steps(10, 4, window=8, samples_per_epoch=38)
    assert [step for step in range(45) if not compiling.is_compiled(timeline, step)] == [
        *(7, 8, 9),  # the window of the first mask: 2 + 4 + 2 samples, with the epoch's short batch
        *(17, 18, 19),
        29,
        *(37, 38, 39),  # the window of the features' fraction bits
    ]


def test_operators_of_the_network_s_input_are_part_of_the_graph() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Conv2d(2, 1, 3))
    timeline = Schedule(t_qw=0, t_qf=0, t_p=0, dt_p=1, n=1).in_steps(3, 4, window=4, samples_per_epoch=10)
    x = torch.randn(4, 2, 9, 9)
    plan = Plan.from_globs(network, ["**"], ["0"], ["input", "1"], ["1"])
    compressor = attach(network, plan, timeline, x, PruneConfig(window=4), QuantizeConfig(decimal=4))
    compressor.at(0)
    network(x)
    expected = network(x).detach()
    torch.compiler.reset()
    network.compile(backend=counting([]), fullgraph=True)  # raises at a graph break
    assert torch.equal(network(x), expected)
    network(x).sum().backward()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_compiled_quantization_has_the_same_bits(gradient: str, rounding: str, masked: bool) -> None:
    torch.manual_seed(0)
    mask = (torch.rand(3, 5) > 0.5).float() if masked else None
    decimal = torch.tensor(2, dtype=torch.int32)
    x, incoming = (torch.randn(7, 3, 5) * 3).requires_grad_(), torch.randn(7, 3, 5) * 5

    def function(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = FakeQuantize.apply(x, decimal, mask, Grid(4, rounding, gradient))  # type: ignore[no-untyped-call]
        return out

    torch.compiler.reset()
    out, compiled = function(x), torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(out, compiled)
    [expected] = torch.autograd.grad(out, x, incoming)
    [found] = torch.autograd.grad(compiled, x, incoming)
    assert torch.equal(expected, found)
    assert expected.any()


def test_graphs_with_operators_are_kept_for_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters
    from torch._functorch import config
    from torch._inductor.utils import fresh_cache

    monkeypatch.setattr(config, "autograd_cache_allow_custom_autograd_functions", False)  # what it is before and after
    counters["aot_autograd"].clear()

    def gradient_of(gradient: str) -> list[float]:
        torch.compiler.reset()
        network, x = nn.Tanh(), torch.linspace(-3, 3, 50, requires_grad=True)
        network.register_forward_hook(lambda *args: fake_quantize(4 * args[2], 4, 2, gradient=gradient).square())
        compiling.compile_network(network, CPU)
        [found] = torch.autograd.grad(network(x).sum(), x)
        return found.tolist()  # type: ignore[no-any-return]

    with fresh_cache():
        first, other, again = map(gradient_of, ("clip_value", "in_range", "clip_value"))
    torch.compiler.reset()
    hits, misses = (counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss"))
    assert (hits, misses) == (1, 2)  # graphs that differ backward alone are two
    assert first == again != other


def test_optimizers_that_can_are_fused() -> None:
    layers = [nn.Parameter(torch.ones(3, 2))]
    optimizers = [torch.optim.Adam(layers), torch.optim.SGD(layers, lr=0.1), torch.optim.Rprop(layers)]
    compiling.fuse(optimizers)
    assert [group.get("fused") for each in optimizers for group in each.param_groups] == [True, True, None]


def test_only_compiling_and_layout_make_another_run() -> None:
    def named(*overrides: str) -> str:
        return signature(compose_run(("task=espcn", *overrides)))

    assert named() == named("trainer.kernels=false", "trainer.warm_start=false") == named("trainer.compile=false")
    assert len({named(), named("trainer.compile=true"), named("trainer.channels_last=true")}) == 3
    assert named("trainer.channels_last=null") == named()
    older = compose_run(("task=espcn",)).plain()
    del older["trainer"]["compile"], older["trainer"]["channels_last"]
    assert signature(older) == named()  # rows from before the keys


def has_channels_last(task: Toy) -> bool:
    weight = next(p for p in task.network.parameters() if p.dim() == 4)
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize(
    ("before", "channels_last", "compiled", "device", "expected"),
    [
        (None, True, False, CPU, True),
        (None, None, False, CPU, False),
        (None, None, True, CPU, True),
        (None, None, True, CUDA, False),
        (None, False, True, CPU, False),
        (True, False, False, CPU, False),
        (True, None, False, CPU, True),
    ],
)
def test_weights_are_laid_out_as_the_key_says(
    before: bool | None, channels_last: bool | None, compiled: bool, device: torch.device, expected: bool
) -> None:
    task = Toy()
    compiling.arrange(task, before, False, CPU)
    values = {name: value.clone() for name, value in task.state_dict().items()}
    compiling.arrange(task, channels_last, compiled, device)
    assert has_channels_last(task) == expected
    assert all(torch.equal(value, values[name]) for name, value in task.state_dict().items())
