"""A run from scratch has the stored bits of this version of the arithmetic, for one short run of each task.

Bits depend on torch and on the CPU: where no value is stored for them, nothing is compared, and the test is skipped
with the words `not compared`. Where a change of bits is intended, raise `qprune.ARITHMETIC` and store new values with
`QPRUNE_STORE_BITS=1 pytest tests/test_arithmetic.py`.
"""

import hashlib
import json
import os
import platform
from pathlib import Path

import pytest
import torch

import qprune
from qprune.config import signature as identity
from qprune.config.compose import compose_run
from qprune.runs.execute import execute

STORED = Path(__file__).with_name("arithmetic.json")
SHORT = (  # 8 epochs of 2 steps, with all events
    *("order=prune_first", "data=synthetic", "trainer.threads=1", "trainer.device=cpu", "trainer.evaluate_every=8"),
    *("epochs=8", "budget=smoke", "budget.epochs=8", "budget.steps_per_epoch=2", "budget.batch_size=4"),
    *("budget.test_samples=4", "prune.window=8"),
    *("schedule.t_p=0", "schedule.dt_p=1", "schedule.t_qw=5", "schedule.t_qf=6"),
)


def machine() -> str:
    """What bits depend on beside the code."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(": ")[2] for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    cpu = names[0] if names else platform.processor()
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {cpu}"


@pytest.mark.parametrize("task", ["cifar", "espcn", "faster_rcnn", "pix2pix", "cyclegan"])
def test_a_run_has_the_stored_bits_of_this_arithmetic(task: str, tmp_path: Path) -> None:
    config = compose_run([f"task={task}", *SHORT, f"results_dir={tmp_path}"])
    row = execute(config)
    network = (identity.run_folder(config) / "network.safetensors").read_bytes()
    found = hashlib.sha256(network + repr(row.score).encode()).hexdigest()
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    version = f"arithmetic {qprune.ARITHMETIC}"
    if os.environ.get("QPRUNE_STORE_BITS"):
        stored.setdefault(version, {}).setdefault(machine(), {})[task] = found
        STORED.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    known = stored.get(version, {}).get(machine(), {}).get(task)
    if known is None:
        pytest.skip(f"not compared: no bits of {version} are stored for {machine()}")
    assert found == known, "other bits: if that is intended, raise qprune.ARITHMETIC and set QPRUNE_STORE_BITS=1"


def test_every_version_says_what_was_stored_for_it() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert f"arithmetic {qprune.ARITHMETIC}" in stored
    assert all(
        len(digest) == 64 for machines in stored.values() for tasks in machines.values() for digest in tasks.values()
    )
