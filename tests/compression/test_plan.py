"""Globs on module paths, and the automatic plan."""

import pytest
from torch import nn

from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.plan import INPUT, Plan, match
from qprune.errors import UserError

PATHS = ["conv1", "layers.0.bn1", "layers.0.bn2", "layers.0.shortcut.1", "layers.10.bn1", "linear"]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["**"], set(PATHS)),
        (["*"], {"conv1", "linear"}),
        (["layers.*.bn[12]"], {"layers.0.bn1", "layers.0.bn2", "layers.10.bn1"}),
        (["layers.?.bn1"], {"layers.0.bn1"}),
        (["**", "!layers.**", "layers.0.bn2"], {"conv1", "linear", "layers.0.bn2"}),
    ],
)
def test_globs(globs: list[str], expected: set[str]) -> None:
    assert match(globs, PATHS, "sites.x") == expected


@pytest.mark.parametrize("glob", ["layers.0.bn3", "!layers.0.bn3"])
def test_a_glob_that_matches_nothing_is_refused(glob: str) -> None:
    with pytest.raises(UserError) as error:
        match(["**", glob], PATHS, "sites.prune_features")
    assert str(error.value).startswith(
        f"sites.prune_features: the glob {glob!r} matches none of the network's 6 paths; did you mean 'layers.0.bn"
    )


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("layers.[9-0].*", "the glob 'layers.[9-0].*' has brackets that are not legal (bad character range 9-0"),
        ("layers.[", "the glob 'layers.[' matches none of the network's 6 paths"),
        ("[]", "the glob '[]' matches none of the network's 6 paths"),
    ],
)
def test_a_glob_with_broken_brackets_is_refused(glob: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        match([glob], PATHS, "sites.prune_features")
    assert str(error.value).startswith(f"sites.prune_features: {said}")


def test_targets_restrict_a_plan_and_the_rest_is_left_alone() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
    )
    plan = Plan.from_globs(network, ["**"], ["**", "!4"], [INPUT, "1"], ["1"])
    assert plan.counts() == {"weight_quantizers": 4, "weight_pruners": 3, "feature_quantizers": 2, "feature_pruners": 1}
    only = plan.restricted(PruneConfig(targets="w"), None)
    assert list(only.counts().values()) == [0, 3, 0, 0]
    assert [site.path for site in only.sites if not (site.prune or site.quantize)] == ["4", INPUT, "1"]
    assert str(plan.sites[0]) == "weight of 0: prune then quantize"


@pytest.mark.parametrize(
    ("axis", "expected"), [("authors", [1, 3, None, 1]), ("tensor", [None] * 4), ("output", [0, 1, 0, 0])]
)
def test_which_weights_have_decimals_per_channel(axis: str, expected: list[int | None]) -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(3, 4, 1), nn.Linear(3, 4), nn.Conv1d(3, 4, 1)]
    assert [QuantizeConfig(weight_axis=axis).axis_of(layer) for layer in layers] == expected
