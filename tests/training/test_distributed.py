"""Devices, and two ranks against one."""

import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qprune.compression.compressor import compress
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.distributed import set_batch_share
from qprune.compression.schedule import Schedule
from qprune.errors import RunFailure, UserError
from qprune.training import distributed as processes
from qprune.training.distributed import any_rank, average_gradients, choose_device, launch, share_of
from tests.training.test_compile import eager_and_compiled


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="trainer.device='gpu' is not one of auto, cpu, cuda"):
        choose_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_gpu_is_named() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="trainer.device=cuda but torch sees no CUDA device; type trainer.device=cpu"):
        choose_device("cuda")


def train(seed: int, factor: float = 1.0) -> dict[str, Any]:
    """Some steps of joint compression on a batch of 7, shared by the ranks; rank 0's state, as plain values.

    factor: of the loss, and of the gradients with it; large ones are clipped by Eq. 2.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 2))
    schedule = Schedule(t_p=0, dt_p=1, n=2, t_qw=4, t_qf=5)
    compressor = compress(
        network, torch.zeros(1, 2, 6, 6), schedule, 1, 7, PruneConfig(0.5, window=10), QuantizeConfig(8)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1 / factor)
    average_gradients([optimizer])
    for step in range(8):
        batch: Tensor = torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(step))
        part, share = share_of(batch)
        set_batch_share(share)
        compressor.at(step)
        optimizer.zero_grad()
        (factor * network(part).square().mean()).backward()
        optimizer.step()
        if step == 3:  # rank 0 writes a checkpoint, and all ranks continue from it
            compressor.collect_on_first_rank()
            states = [compressor.state_dict()]
            if torch.distributed.is_initialized():
                torch.distributed.broadcast_object_list(states)
            compressor.load_state_dict(states[0])
    assert not any_rank(False, torch.device("cpu"))
    return {name: value.tolist() for name, value in network.state_dict().items()}


def work_of_ranks() -> dict[Any, Any]:
    """What the tests below compare with one process, in one start of two ranks."""
    found: dict[Any, Any] = {factor: train(0, factor) for factor in (1.0, 300.0)}
    return found | {"losses": mean_losses(), "compiled": eager_and_compiled()}


@pytest.fixture(scope="module")
def ranks() -> dict[Any, Any]:
    return launch(2, work_of_ranks)


@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_two_ranks_agree_with_one(factor: float, ranks: dict[Any, Any]) -> None:
    one, two = train(0, factor), ranks[factor]
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.endswith((".mask", ".decimal", ".updates")):
            assert value == two[name], name
        else:
            assert torch.allclose(torch.tensor(value), torch.tensor(two[name]), atol=1e-6), name


def mean_losses() -> tuple[dict[str, float], dict[str, float]]:
    """The losses of a batch of 7 in all, and those of this rank's samples."""
    part, share = share_of(torch.arange(7.0))
    set_batch_share(share)
    own = {"a": part.mean(), "b": part.square().mean()}
    whole = processes.losses_of_whole_batch(own)
    return tuple({k: float(v) for k, v in each.items()} for each in (whole, own))  # type: ignore[return-value]


def test_losses_are_those_of_all_samples(ranks: dict[Any, Any]) -> None:
    whole, own = ranks["losses"]
    assert whole == pytest.approx({"a": 3.0, "b": 13.0})
    assert own == {"a": 1.5, "b": 3.5}
    assert mean_losses()[0] == {"a": 3.0, "b": 13.0}


def test_ranks_compile_too(ranks: dict[Any, Any]) -> None:
    (eager, compiled), graphs = ranks["compiled"]
    assert compiled == eager
    assert graphs == 4  # as in one process


def fail(kind: str) -> None:
    torch.distributed.barrier()  # both ranks are there
    if torch.distributed.get_rank() == 1:
        if kind == "die":
            os._exit(7)
        raise UserError("data.root=nowhere is not a folder; give one that is")
    torch.distributed.barrier()  # waits for the rank that will not come


@pytest.mark.parametrize(
    ("kind", "expected", "text"),
    [
        ("raise", UserError, "^data.root=nowhere is not a folder; give one that is$"),
        ("die", RunFailure, "^a rank died, and the others were stopped"),
    ],
)
def test_a_rank_that_fails_ends_the_job_and_says_why(kind: str, expected: type[Exception], text: str) -> None:
    with pytest.raises(expected, match=text):
        launch(2, fail, kind)


def interrupt_agent() -> int:
    """Send SIGINT to the process that launched the ranks."""
    if torch.distributed.get_rank() == 0:
        os.kill(os.getppid(), signal.SIGINT)
    torch.distributed.barrier()
    return 1


def test_ranks_leave_ignored_signals_ignored_and_handlers_as_they_were() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)]
    try:
        assert launch(2, interrupt_agent) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)] == handlers
