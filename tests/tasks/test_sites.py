"""The operator lists of spec 3.3, from the globs in the task configs."""

import pytest

from qprune.compression.plan import Plan
from qprune.config.compose import Composer
from qprune.tasks.models.espcn import ESPCN
from qprune.tasks.models.mobilenetv2 import MobileNetV2
from tests.faults.recipes import config_of

NETWORKS = {"cifar": MobileNetV2, "espcn": ESPCN}


def plan_of(task: str) -> Plan:
    return Plan.from_globs(NETWORKS[task](), **config_of(f"task={task}")["task"]["sites"])


@pytest.mark.parametrize(
    ("task", "counts"),
    [
        ("cifar", {"weight_quantizers": 58, "weight_pruners": 56, "feature_quantizers": 54, "feature_pruners": 52}),
        ("espcn", {"weight_quantizers": 3, "weight_pruners": 1, "feature_quantizers": 3, "feature_pruners": 1}),
    ],
)
def test_operators_are_as_many_as_the_authors_placed(task: str, counts: dict[str, int]) -> None:
    assert plan_of(task).counts() == counts


def test_cifar_spares_the_weights_of_the_first_and_the_last_layer() -> None:
    assert [s.path for s in plan_of("cifar").sites if s.kind == "weight" and not s.prune] == ["conv1", "linear"]
    features = [s.path for s in plan_of("cifar").sites if s.kind == "feature"]
    assert [s.path for s in plan_of("cifar").sites if s.kind == "feature" and not s.prune] == ["input", "pool"]
    assert features[:6] == ["input", "bn1", "layers.0", "layers.0.bn1", "layers.0.bn2", "layers.1"]


def test_espcn_prunes_only_around_its_middle_layer() -> None:
    assert [str(s) for s in plan_of("espcn").active] == [
        "weight of conv1: quantize",
        "weight of conv2: prune then quantize",
        "weight of conv3: quantize",
        "feature of input: quantize",
        "feature of tanh1: quantize",
        "feature of conv2: prune",
        "feature of tanh2: quantize",
    ]


SCHEDULES = {  # t_qw, t_qf, t_p, dt_p
    "cifar": {"quantize_only": (230, 240), "prune_first": (230, 235, 100, 15), "quantize_first": (160, 170, 180, 15)},
    "espcn": {"quantize_only": (140, 150), "prune_first": (160, 170, 140, 5), "quantize_first": (140, 150, 155, 5)},
    "pix2pix": {
        "quantize_only": (110, 120),
        "prune_only": (None, None, 100, 15),
        "prune_first": (280, 290, 100, 15),
        "quantize_first": (110, 120, 130, 15),
    },
}
SCHEDULES["cyclegan"] = SCHEDULES["pix2pix"]


@pytest.mark.parametrize("task", SCHEDULES)
def test_schedules_are_those_of_appendix_b(task: str) -> None:
    with Composer() as composer:
        for order, times in ({"baseline": ()} | SCHEDULES[task]).items():
            config = composer.config([f"task={task}", f"order={order}"])
            expected = [*times, None, None, None, None][:4]
            assert [config.schedule[key] for key in ("t_qw", "t_qf", "t_p", "dt_p")] == expected, order
            assert config.schedule.n == 4
            assert task in ("cifar", "espcn") or (config.epochs, config.prune.window) == (300, 128)
