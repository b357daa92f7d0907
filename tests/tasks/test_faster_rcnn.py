"""The detection task: recipe, operators, sizes, and that training helps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor
from torchvision.models import ResNet101_Weights

from qprune.compression.activation_trace import with_all_active
from qprune.compression.compressor import attach
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.footprint import actual_footprint
from qprune.compression.plan import Plan
from qprune.compression.schedule import Schedule
from qprune.config.compose import compose_run
from qprune.errors import UserError
from qprune.tasks.faster_rcnn import FasterRcnn, imagenet_weights
from qprune.tasks.models.faster_rcnn import FasterRCNN
from qprune.training.task import DataOptions, Limits
from tests.faults.recipes import config_of

SYNTHETIC = DataOptions(source="synthetic")
SMOKE = Limits(epochs=4, steps_per_epoch=16, batch_size=32, test_samples=64)


def task_with(
    limits: Limits = SMOKE, data: DataOptions = SYNTHETIC, on_synthetic: Mapping[str, Any] | None = None, **given: Any
) -> FasterRcnn:
    """The task as its config has it, with changes."""
    values = compose_run(["task=faster_rcnn"]).task.arguments
    values["on_synthetic"] |= on_synthetic or {}
    task = FasterRcnn(data=data, limits=limits, seed=0, **(values | given))
    task.optimizers()
    return task


@pytest.fixture(scope="module")
def paper_plan() -> Plan:
    with torch.device("meta"):
        return Plan.from_globs(FasterRCNN(), **config_of("task=faster_rcnn")["task"]["sites"])


def test_operators_are_as_many_as_the_paper_means(paper_plan: Plan) -> None:
    """Spec 3.3, with layers 2 to 4 for the stages that an index bug had taken (spec 7.1)."""
    convolutions = 4 * 3 + 1 + 23 * 3 + 1 + 3 * 3 + 1  # of layers 2 to 4, shortcuts included
    norms = 2 * (4 + 23 + 3)  # after the first and second convolution of a block
    assert paper_plan.counts() == {
        "weight_quantizers": convolutions + 3 + 2,  # proposal head and outputs
        "weight_pruners": convolutions,
        "feature_quantizers": norms + 4,  # layers 2 and 3, the proposal head's hidden layer, the regions' means
        "feature_pruners": norms + 1,  # layer 2
    }
    assert convolutions == 93


def test_stem_first_stage_and_outputs_are_spared(paper_plan: Plan) -> None:
    alone = [site.path for site in paper_plan.sites if not (site.prune or site.quantize)]
    assert len(alone) == 11
    assert all(path == "backbone.conv1" or path.startswith("backbone.layer1.") for path in alone)
    only_quantized = [site.path for site in paper_plan.sites if site.quantize and not site.prune]
    assert only_quantized == [
        "rpn.head.conv",
        "rpn.head.cls",
        "rpn.head.bbox",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "backbone.layer3",
        "rpn.head.relu",
        "roi_heads.box_head.pool",
    ]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("quantize_only", [7.2, 7.5, None, None]),
        ("quantize_only_paper", [5.2, 5.5, None, None]),
        ("prune_first", [7.2, 7.5, 3, 0.5]),
        ("quantize_first", [6.5, 6.8, 6.9, 0.5]),
        ("quantize_first_paper", [5.2, 5.5, 5.7, 0.5]),
    ],
)
def test_schedules_are_the_authors_and_the_printed_ones(schedule: str, expected: list[float | None]) -> None:
    values = config_of("task=faster_rcnn", "order=prune_first", f"schedule=faster_rcnn/{schedule}")["schedule"]
    assert [values[key] for key in ("t_qw", "t_qf", "t_p", "dt_p")] == expected


def test_the_recipe_is_the_paper_s() -> None:
    task = task_with(Limits(epochs=9), on_synthetic={"batch_size": 1, "learning_rate": 1e-3})
    assert (len(task.train_batches), task.train_batches.samples) == (320, 320)  # every picture twice
    rates = []
    for epoch in range(9):
        task.begin_epoch(epoch)
        rates.append(task.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3] * 5 + [1e-4] * 4)
    weights, biases = task.optimizer.param_groups
    assert (weights["weight_decay"], biases["weight_decay"], weights["momentum"]) == (1e-4, 0.0, 0.9)
    assert {parameter.dim() for parameter in biases["params"]} == {1}
    assert min(parameter.dim() for parameter in weights["params"]) == 2
    trained = sum(p.numel() for group in (weights, biases) for p in group["params"])
    assert trained == sum(p.numel() for p in task.network.parameters() if p.requires_grad)


def test_marks_say_what_is_not_the_paper_s() -> None:
    assert task_with().marks == [
        "synthetic data",
        "not pretrained",
        "backbone: small instead of resnet101",
        "short_side: 160 instead of 600",
        "rois: 32 instead of 128",
        "proposals: 50 instead of 300",
        "batch_size: 8 instead of 1",
        "training set: 128 of 320",
    ]


def test_training_finds_objects_through_every_phase() -> None:
    """The smoke budget, quantization first: the score is far above the untrained network's, with operators active."""
    torch.manual_seed(0)
    task = task_with()
    untrained = task.evaluate()["map_percent"]
    values = config_of("task=faster_rcnn", "order=quantize_first")
    schedule = Schedule(**{key: each for key, each in values["schedule"].items() if key != "slots"}).scaled(4 / 9)
    timeline = schedule.in_steps(16, 8, 32, task.train_batches.samples)
    pruning, quantization = PruneConfig(0.5, "f", 32, "channel"), QuantizeConfig(8)
    plan = Plan.from_globs(task.network, **values["task"]["sites"])
    compressor = attach(task.network, plan, timeline, task.example, pruning, quantization)
    task.optimizers()
    for epoch in range(4):
        task.begin_epoch(epoch)
        task.train()
        for step, batch in enumerate(task.train_batches.epoch(epoch)):
            compressor.at(16 * epoch + step)
            losses = task.train_step(batch)
    assert set(losses) == {"classifier", "box_reg", "objectness", "rpn_box_reg"}
    assert not any(loss.requires_grad for loss in losses.values())
    compressor.at(64)
    assert compressor.sparsity["feature"] == pytest.approx(0.5)
    with compressor.evaluating():
        scores = task.evaluate()
    assert untrained < 5
    assert scores["map_percent"] > untrained + 10
    assert {name for name in scores if name != "map_percent"} == {
        f"ap_percent_{name}" for name in ("box", "disc", "triangle")
    }
    alone = {stored.name for stored in with_all_active(task.network, task.example).reads if not stored.operators}
    assert "input" in alone
    assert not any(".layer4." in name and name.endswith(("bn1", "bn2")) for name in alone)
    size = actual_footprint(task.network, task.size_example)
    assert size.elements("input") == 3 * 480 * 720
    assert 0 < size.size_bits() < 32 * size.elements()


def test_a_picture_without_objects_can_be_trained_on() -> None:
    task = task_with(on_synthetic={"batch_size": 1})
    sample = task.test[0]._replace(boxes=torch.empty(0, 4), labels=torch.empty(0, dtype=torch.int64))
    task.train()
    losses = task.train_step([sample])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["box_reg"] == 0


def test_keys_for_synthetic_data_are_checked() -> None:
    with pytest.raises(UserError, match=r"task\.on_synthetic\.bacbone is not a key of it; did you mean 'backbone'\?"):
        task_with(on_synthetic={"bacbone": "small"})


def test_pretrained_weights_that_cannot_be_had_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> dict[str, Tensor]:
        raise URLError("no route to host")

    monkeypatch.setattr(ResNet101_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match=r"resnet101-.*\.pth cannot be had .*checkpoints, or type task\.pretrained=fal"):
        imagenet_weights("resnet101")
    with pytest.raises(UserError, match=r"no pretrained weights for task\.backbone=small; type task\.pretrained=false"):
        task_with(on_synthetic={"pretrained": True})


def test_a_missing_root_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.root is not set; give the folder that holds VOCdevkit, or type data="):
        task_with(data=DataOptions("real"))


def test_parts_of_the_real_set_are_marked_and_give_a_score(real_root: Path) -> None:
    if not (real_root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "subset_train.txt").is_file():
        pytest.skip("no part of VOC 2007 in QPRUNE_DATA")
    task = task_with(
        Limits(epochs=1, steps_per_epoch=1, test_samples=2),
        DataOptions("real", str(real_root)),
        train_split="subset_train",
        test_split="subset_val",
        backbone="small",
        pretrained=False,
        short_side=160,
    )
    assert any(mark.startswith("task.train_split: subset_train (") for mark in task.marks)
    task.train()
    [batch] = task.train_batches.epoch(0)
    assert all(torch.isfinite(loss) for loss in task.train_step(batch).values())
    assert 0 <= task.evaluate()["map_percent"] <= 100
