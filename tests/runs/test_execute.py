"""A run from config to row: what it writes, finds again, refuses, and leaves behind when it fails."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from qprune import atomic_write as files
from qprune.config.build import Recipe
from qprune.config.compose import compose_run
from qprune.errors import RunFailure, UserError
from qprune.runs.execute import execute, plan
from qprune.training import checkpoint

BASE = OmegaConf.create("""
seed: 0
epochs: 16
force: false
wait: false
prune: {sparsity: 0.5, targets: wf, window: 6, granularity: element, rule: exact, border: tile}
quantize: {bits: 8, feature_bits: 8, targets: wf, rounding: trunc, gradient: clip_value, saturate: [0.0, 1.0],
  weight_axis: authors, decimal: null}
order: {name: prune_first, steps: [prune, quantize]}
schedule: {t_qw: 10, t_qf: 12, t_p: 0, dt_p: 2, n: 4}
budget: {name: half, epochs: 8, steps_per_epoch: null, batch_size: null, test_samples: null}
data: {source: synthetic, root: null, verify: true}
trainer: {device: cpu, precision: float32, ranks: 1, threads: null, keep_memory: false, kernels: true, compile: false,
  evaluate_every: 1, checkpoint_minutes: 5, warm_start: false}
logger: {name: csv}
task:
  _target_: tests.training.toy.Toy
  name: toy
  sites: {quantize_weights: ['**'], prune_weights: ['0'], quantize_features: [input, '1'], prune_features: ['1']}
  paper_size: {count_input: true, pruned_weights: ['**'], pruned_features: ['**']}
""")


def config(folder: Path | str, *changes: str) -> Any:
    """The config of a toy run, with changes as one types them."""
    return OmegaConf.merge(BASE, {"results_dir": str(folder)}, OmegaConf.from_dotlist(list(changes)))


def test_a_run_writes_its_folder_and_is_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = execute(config(tmp_path))
    (folder,) = (tmp_path / "toy").iterdir()
    files = {"config.yaml", "environment.json", "histograms.json", "metrics.csv", "network.safetensors", "plan.csv"}
    assert {path.name for path in folder.iterdir()} == {
        *files,
        ".lock",
        "SHA256SUMS",
        "operators.json",
        "result.json",
        "timing.json",
    }
    assert (row.notation, row.epochs, row.steps) == ("P0.5(w,f)->Q8(w,f)", 8, 24)
    assert row.marks == ["toy data", "8 of 16 epochs (budget=half)"]
    assert (row.weight_sparsity, row.feature_sparsity) == (0.5, 0.5)
    # conv 2*4*9+4, norm 8, conv 4*25+1 parameters; all features twice, halved; 50 inputs.
    assert row.weight_bits_paper == (76 + 8 + 101) * 8 * 0.5
    assert row.feature_bits_paper == 2 * (100 + 100 + 1) * 8 * 0.5
    assert row.input_bits_paper == 50 * 8 * 0.5
    assert row.density_paper == pytest.approx(
        row.score / (row.weight_bits_paper + row.feature_bits_paper + row.input_bits_paper)
    )
    # two pruned or quantized weights, 36 of 72 left; biases and norms in 32 bits
    assert row.weight_bits_actual == 36 * 8 + 100 * 8 + (4 + 8 + 1) * 32
    masks = [v for k, v in load_file(folder / "network.safetensors").items() if k.endswith(".mask")]
    assert row.mask_bits_actual == 72 + 100
    bits = row.weight_bits_actual + row.feature_bits_actual + row.input_bits_actual
    assert row.density_with_masks == pytest.approx(row.score / (bits + 172))
    # 25 windows of 4 * 2 * 9 weights and one of 100, with padding; half of the first sums are read, on half the weights
    assert row.costs["macs"] == 25 * 72 + 100
    assert row.costs["effective_macs"] < (25 * 72 + 100) / 2
    assert row.density_effective_bops == pytest.approx(row.score / row.costs["effective_bops"])
    assert [float(mask.mean()) for mask in masks] == [0.5, 0.5]
    before = (folder / "result.json").read_bytes()
    capsys.readouterr()
    (folder / "checkpoints").mkdir()  # of a process that was killed right after it wrote the row
    assert execute(config(tmp_path, "trainer.threads=1")) == row
    assert "finished before" in capsys.readouterr().out
    assert not (folder / "checkpoints").exists()
    assert (folder / "result.json").read_bytes() == before
    execute(config(tmp_path, "force=true"))
    assert (folder / "result.json").read_bytes() == before


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(tmp_path: Path) -> None:
    rows = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        execute(config(tmp_path / name, f"seed={seed}"))
        rows.append(next((tmp_path / name).rglob("result.json")).read_bytes())
    assert rows[0] == rows[1] != rows[2]


def test_a_baseline_has_no_operators(tmp_path: Path) -> None:
    row = execute(config(tmp_path, "order.name=baseline", "order.steps=[]"))
    assert row.notation == "Baseline"
    assert row.weight_bits_paper == 185 * 32
    assert json.loads(next(tmp_path.rglob("operators.json")).read_text()) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("prune.sparsity=1.0", "prune.sparsity=1.0 is not a number in [0, 1)"),
        ("quantize.bits=17", "quantize.bits=17 is not a whole number of bits in [2, 16]"),
        (
            "quantize.saturate=[0.9,0.1]",
            "quantize.saturate=[0.9, 0.1] is not a pair of rising quantiles within [0, 1]; type quantize.saturate=[",
        ),
        ("schedule.n=0", "schedule.n=0 is not a whole number of pruning events in [1, 10000]"),
        ("schedule.t_qf=16", "the last quantize event (schedule.t_qw and schedule.t_qf) is at epoch 16"),
        ("schedule.t_qw=3", "the order is prune then quantize, but the last prune event"),
        ("schedule.t_qw=null", "schedule.t_qw is missing, and quantize.targets=wf needs it"),
        ("prune.windw=3", "unknown key 'prune.windw'; did you mean 'prune.window'?; the keys of prune are sparsity,"),
        ("task.sites.prune_features=['bn*']", "sites.prune_features: the glob 'bn*' matches none of the network's 6"),
        ("task._target_=tests.nowhere.Task", "task._target_=tests.nowhere.Task cannot be imported"),
        (
            "task._target_=tests.training.toy.ToyBatches",
            "toy.ToyBatches is not a subclass of qprune.training.task.Task",
        ),
        ("task._target_=pathlib.Path", "task._target_=pathlib.Path is not a subclass of qprune.training.task.Task"),
        ("task.factor=much", "task.factor='much' is not a number"),
        ("task.name=../toy", "task.name='../toy' is not a name of at most 64 letters, digits, '_', '-' and '.'"),
        ("trainer.thread=1", "unknown key 'trainer.thread'; did you mean 'trainer.threads'?"),
        ("wiat=true", "unknown key 'wiat'; did you mean 'wait'?; the keys are seed, epochs, results_dir"),
        ("task.factr=2", "task.factr is not an argument of tests.training.toy.Toy; did you mean 'factor'?"),
        ("epochs=0", "epochs=0 is not a whole number of epochs in [1, 1000000]"),
        ("trainer.device=gpu", "trainer.device='gpu' is not one of auto, cpu, cuda"),
        ("trainer.precision=int8", "trainer.precision='int8' is not one of float32, bfloat16, float16"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(change: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        execute(config(tmp_path / "results", change))
    assert text in str(error.value)
    assert [p for p in (tmp_path / "results").rglob("*") if p.is_file()] == []


def test_advice_of_the_library_names_keys(tmp_path: Path) -> None:
    quantize_at_once = ("order.steps=[quantize]", "schedule.t_qw=0", "schedule.t_qf=0")
    with pytest.raises(UserError) as error:
        execute(config(tmp_path, *quantize_at_once))
    assert str(error.value) == (
        "schedule.t_qf is at step 0, before any feature was seen; raise schedule.t_qf, or fix the decimal bits "
        "(quantize.decimal=7 for example)"
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file.* cannot be written \(Not a directory\); choose a folder that can"):
        execute(config(tmp_path / "file"))


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = execute(config(tmp_path / "whole"))
    flush, flushed = files.os.fsync, []

    def filling(file: int) -> None:
        flushed.append(file)
        if len(flushed) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(file)

    monkeypatch.setattr(files.os, "fsync", filling)
    with pytest.raises(RunFailure, match=r"no space is left on the disk to write .*results_dir="):
        execute(config(tmp_path / "full", "trainer.checkpoint_minutes=0"))
    monkeypatch.setattr(files.os, "fsync", flush)
    (folder,) = (tmp_path / "full" / "toy").iterdir()
    assert not list(folder.rglob(".*.pt.*"))
    assert checkpoint.load_newest(folder / "checkpoints") is not None
    assert not (folder / "result.json").exists()
    assert execute(config(tmp_path / "full")) == expected


def test_the_plan_lists_every_tensor_and_what_is_left_alone(tmp_path: Path) -> None:
    text = plan(config(tmp_path))
    assert "P0.5(w,f)->Q8(w,f)" in text
    assert "1 tensor not compressed" in text
    assert "8 epochs; weights quantized at 5; features quantized at 6; masks change at 1, 2, 3, 4\n" in text
    assert (
        "after the last pruning event: 4 epochs, with learning rates that sum to 0.0226\n" in text
    )  # 0.01 * 0.9^epoch
    assert "after the last quantization event: 2 epochs, with learning rates that sum to 0.0101\n" in text
    assert "4       feature  1 elements  -      -" in text
    # weights 36 + 100 of 8 bits and 13 floats, an input of 50 and 50 of 100 features of 8 bits, a float; two masks
    assert "sizes in Mb once trained: weights 0.001504, features 0.000432, inputs 0.0004, masks 0.000172" in text
    assert "cost: 0.00190 M products, " in text
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_features_of_one_block_are_told_apart_by_who_reads_them() -> None:
    text = plan(compose_run(("task=cifar", "order=baseline", "data=synthetic")))
    tensors = [line.split(" feature ")[0].strip() for line in text.splitlines() if " feature " in line]
    assert "layers.0, read by layers.0.conv2" in tensors
    assert "bn1" in tensors  # the only one of its name
    assert len(set(tensors)) == len(tensors) > 50


def test_budgets_scale_every_time_by_one_factor(tmp_path: Path) -> None:
    recipe = Recipe.from_config(config(tmp_path))
    assert recipe.limits.epochs == 8
    assert (recipe.schedule.t_qw, recipe.schedule.t_qf, recipe.schedule.dt_p) == (5.0, 6.0, 1.0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains(precision: str, tmp_path: Path) -> None:
    row = execute(config(tmp_path, f"trainer.precision={precision}"))
    assert row.feature_sparsity == 0.5
    assert torch.isfinite(torch.tensor(row.score))
