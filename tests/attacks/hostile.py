"""What strangers, editors and terminals send: names, values, and a results folder to put them into."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from qprune.config import signature as identity
from qprune.runs.execute import execute
from qprune.runs.folder import SUMS_FILE, RunFolder, sum_of
from tests.runs.test_execute import config as toy_config
from tests.training import toy

_PIECES = (
    *r"[bold]x[/bold] [/b] [link=file:///etc] [a](http://x) :smile: a\b \n $\frac{ $x$ `id` <b>&amp;</b>".split(),
    *"</script><script>x()</script> =1+1 @A1 -x +x _hidden a|b **b** %d {0} {name} é 漢字 😀 it's \" ~ # ^".split(),
    *"2026 yes null [a a,b & ${seed} x 1e5 0x1F ( a=b ???".split(),
    *("a: b", "\t", "\x1b[31m", "\x07", "\u202e", "\r", "\udcff\udc80", " ", "\u00a0"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e300, -1e300, 5e-324, "", "x", "1"),
    *("nan", "[/b]", "\x1b[2J", "$\\frac{", "é" * 3000, [], [[]], {}, {"a": None}, [1, "a", None], [0] * 5000),
    *({"": {"": 0}}, float("nan"), float("inf"), float("-inf"), "../../x", "/etc/passwd", [2**70], ["a" * 300]),
    "2026-01-01",
)


def name(draw: random.Random, path: bool = True) -> str:
    """Draw a name; one that may be a folder's, if `path`."""
    text = "".join(draw.choice(_PIECES) for _ in range(draw.randint(1, 3)))
    if path:
        text = text.replace("/", "").replace("\0", "")
        text = "x" if text.strip(". ") == "" else text
    return text


class Pictured(toy.Toy):
    """The toy task with pictures."""

    def pictures(self) -> dict[str, Tensor]:
        return {"test": torch.arange(3 * 8 * 12).reshape(3, 8, 12).to(torch.uint8)}


def finished_runs(folder: Path) -> list[Path]:
    """Train two toy runs below `folder`, of seeds 0 and 1; return their folders."""
    own = ("task._target_=tests.attacks.hostile.Pictured", "order.name=prune_first")
    configs = [toy_config(folder, *own, f"seed={seed}") for seed in (0, 1)]
    for config in configs:
        execute(config)
    return [identity.run_folder(config) for config in configs]


def copied(runs: list[Path], place: Path) -> list[Path]:
    """Copy the runs into a results folder; return their folders there."""
    copies = []
    for run in runs:
        copies.append(place / run.parent.name / run.name)
        shutil.copytree(run, copies[-1])
    return copies


def sum_again(folder: Path) -> None:
    """Write the checksums of a run's files as they now are, as whoever edits them can."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (SUMS_FILE, ".lock")]
    RunFolder(folder).write_sums({str(path.relative_to(folder)): sum_of(path.read_bytes()) for path in files})


def changed(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """Draw a value in JSON that differs from another one in a random place."""
    if depth > 4 or draw.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return draw.choice(VALUES)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    place = draw.choice(sorted(value)) if isinstance(value, dict) else draw.randrange(len(value))
    kind = draw.random()
    if kind < 0.15:
        del copy[place]
    elif kind < 0.25 and isinstance(copy, dict):
        copy[name(draw, path=False)] = draw.choice(VALUES)
    elif kind < 0.35 and isinstance(copy, list):
        copy += copy
    else:
        copy[place] = changed(draw, value[place], depth + 1)
    return copy


def nested(depth: int) -> str:
    """Return JSON, which is YAML too, of so many levels."""
    return "[" * depth + "]" * depth


def config_of(run: Path) -> dict[str, Any]:
    """The config of a run as plain values."""
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def row_of(run: Path) -> dict[str, Any]:
    """The row of a run."""
    row: dict[str, Any] = json.loads((run / "result.json").read_bytes())
    return row
