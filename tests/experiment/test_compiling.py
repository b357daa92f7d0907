"""trainer.compile, pack_features and fuse_relu: which steps, how many graphs, the same bits where they are promised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch._dynamo.testing import CompileCounterWithBackend

from qprune.command_line.composing import compose_checked
from qprune.compression import kernels
from qprune.compression.schedule import Schedule
from qprune.errors import UserError
from qprune.experiment import compiling
from qprune.experiment.identity import signature
from tests.experiment.toy import prepared


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
    compiling.fuse(plain[2].optimizers)  # which rounds in another order
    assert compiled[2].fit() == plain[2].fit()
    assert counter.frame_count
    decimals = [[p.operator.decimal.tolist() for p in run[1].quantizers("feature")] for run in (plain, compiled)]
    assert decimals[0] == decimals[1]


def test_steps_that_collect_and_short_batches_are_not_compiled() -> None:
    timeline = Schedule(t_qw=3, t_qf=4, t_p=0, dt_p=1, n=2).in_steps(10, 4, window=8, samples_per_epoch=38)
    assert [step for step in range(45) if not compiling.is_compiled(timeline, step)] == [
        *(7, 8, 9),  # the window of the first mask: 2 + 4 + 2 samples, with the epoch's short batch
        *(17, 18, 19),
        29,
        *(37, 38, 39),  # the window of the features' decimal bits
    ]


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


def test_only_compiling_makes_another_run() -> None:
    def named(*overrides: str) -> str:
        [composed] = compose_checked(("task=espcn", *overrides))
        return signature(composed.config)

    assert (
        named()
        == named("trainer.kernels=false", "trainer.pack_features=true", "trainer.fuse_relu=false")
        == named("trainer.compile=false")
    )
    assert named("trainer.compile=true") != named()
    [composed] = compose_checked(("task=espcn",))
    older = OmegaConf.to_container(composed.config, resolve=True)
    assert isinstance(older, dict)
    del older["trainer"]["compile"]
    assert signature(OmegaConf.create(older)) == named()  # rows from before the key
