"""Operators (spec 3.3) and element counts (spec 5.1) of the translation networks; test_golden_tables has Table 6."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from qprune.compression.footprint import Footprint, actual_footprint, paper_footprint
from qprune.compression.plan import Plan
from qprune.config.build import Recipe
from qprune.tasks.models.resnet_generator import ResnetGenerator
from qprune.tasks.models.unet import UNet
from tests.faults.recipes import config_of

NETWORKS = {"pix2pix": UNet, "cyclegan": ResnetGenerator}
COUNTED = {"pix2pix": lambda: UNet(extra_norm=True), "cyclegan": lambda: ResnetGenerator(norm="batch")}


def plan_of(task: str, *overrides: str) -> Plan:
    with torch.device("meta"):
        return Plan.from_globs(NETWORKS[task](), **config_of(f"task={task}", *overrides)["task"]["sites"])


@cache
def counted(task: str) -> nn.Module:
    with torch.device("meta"):  # shapes are all that is counted
        return COUNTED[task]()


def size_of(task: str, targets: str | None, **changes: Any) -> Footprint:
    """The accounting `paper` of a run that prunes `targets` and quantizes (None: of the baseline)."""
    overrides = ("order=baseline",) if targets is None else ("order=prune_first", f"prune.targets={targets}")
    recipe = Recipe.from_config(config_of(f"task={task}", *overrides))
    size = replace(recipe.paper_size, **changes)
    return paper_footprint(
        counted(task), torch.zeros(1, 3, 256, 256, device="meta"), size, recipe.pruning, recipe.quantization
    )


@pytest.mark.parametrize(
    ("task", "counts"),
    [
        # the authors' 17 feature quantizers of Pix2Pix count the input twice
        ("pix2pix", {"weight_quantizers": 16, "weight_pruners": 12, "feature_quantizers": 16, "feature_pruners": 12}),
        ("cyclegan", {"weight_quantizers": 24, "weight_pruners": 20, "feature_quantizers": 24, "feature_pruners": 20}),
    ],
)
def test_pix2pix_and_cyclegan_have_the_operators_of_the_authors(task: str, counts: dict[str, int]) -> None:
    assert plan_of(task).counts() == counts


def test_cyclegan_prunes_22_weights_in_the_authors_variant() -> None:
    plan = plan_of("cyclegan", "task.sites.prune_weights=['**','!first.**','!last']")
    assert plan.counts()["weight_pruners"] == 22
    assert [s.path for s in plan.sites if s.kind == "weight" and not s.prune] == ["first.conv", "last"]


def test_pix2pix_spares_the_two_outer_and_the_two_inner_layers() -> None:
    sites = plan_of("pix2pix").sites
    spared = ["outer_down.conv", "inner_down.conv", "inner_up.conv", "outer_up"]
    assert [s.path for s in sites if s.kind == "weight" and not s.prune] == spared
    assert [s.path for s in sites if s.kind == "feature" and s.quantize and not s.prune] == [
        *("input", "outer_down", "inner_down"),
        *(f"joins.{i}" for i in range(7)),
    ]
    assert [s.path for s in sites if s.kind == "feature" and s.prune and not s.quantize] == [
        f"ups.{i}.norm" for i in range(6)
    ]


def test_cyclegan_spares_two_layers_at_either_end() -> None:
    sites = plan_of("cyclegan").sites
    spared = ["first.conv", "down1.conv", "up2.conv", "last"]
    assert [s.path for s in sites if s.kind == "weight" and not s.prune] == spared
    features = [s for s in sites if s.kind == "feature"]
    sums = [f"blocks.{i}" for i in range(9)]
    assert [s.path for s in features if not s.prune] == ["input", "first.norm", "down1.norm", *sums, "up2.norm"]
    assert [s.path for s in features if not s.quantize] == [f"blocks.{i}.norm2" for i in range(9)]


def test_sizes_of_both_translation_networks_are_those_of_the_paper() -> None:
    pix2pix, cyclegan = (size_of(task, None, count_input=True) for task in ("pix2pix", "cyclegan"))
    kinds = ("feature", "weight", "input")
    assert [pix2pix.elements(kind) for kind in kinds] == [16_466_944, 54_414_083, 196_608]
    assert [cyclegan.elements(kind) for kind in kinds] == [130_416_640, 11_383_427, 196_608]


def test_cyclegan_is_charged_12_bits_where_the_paper_s_8_are_not_asked_for() -> None:
    paper, real = size_of("cyclegan", "w"), size_of("cyclegan", "w", feature_bits=None)
    assert real.size_bits("feature") == 1.5 * paper.size_bits("feature")
    assert round(1e12 / (81.8 * real.size_bits()), 2) == 7.59


def test_a_reflected_rim_costs_no_memory_in_the_actual_accounting() -> None:
    network = ResnetGenerator(blocks=1, width=2)
    features = actual_footprint(network, torch.zeros(1, 3, 16, 16)).entries
    stored = [entry.elements for entry in features if entry.kind != "weight"]
    # pictures and what each convolution and norm gives; the ReLU is part of its reader
    assert max(stored) == 3 * 256
    assert 3 * 22 * 22 not in stored
