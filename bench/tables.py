"""Measure `qprune tables` over made-up runs, which have what a real run leaves for tables."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from bench.compare import Settings, alone, table
from qprune.config import signature as identity
from qprune.config.compose import Composer

RECIPES = (
    ["order=baseline"],
    ["order=quantize_only"],
    ["order=prune_first", "prune.targets=w"],
    ["order=prune_first"],
    ["order=quantize_first"],
)  # rows of tables 2, 3 and 4
FIELDS = {
    "schema_version": 1,
    "task": "espcn",
    "metric": "psnr_db",
    "higher_is_better": True,
    "epochs": 200,
    "steps": 33800,
    "budget": "paper",
    "data_source": "real",
    "marks": [],
    "weight_sparsity": 0.0,
    "feature_sparsity": 0.0,
    **{f"{kind}_bits_{name}": 1e6 for kind in ("weight", "feature", "input") for name in ("paper", "actual")},
    "density_paper": 8.0,
    "density_actual": 9.0,
    "metrics": {},
}


def make_runs(folder: Path, count: int) -> None:
    """Write `count` run folders: five recipes of ESPCN, each over `count` / 5 seeds."""
    chance = random.Random(0)
    with Composer() as composer:
        for words in RECIPES:
            words = ["task=espcn", *words]
            config = composer.config(words)
            text = OmegaConf.to_yaml(config, resolve=True)
            notation = identity.notation(config)
            for seed in range(count // len(RECIPES)):
                signature = composer.signature(words, seed)
                scores = [chance.gauss(32, 0.1) for _ in range(200)]
                row = {"signature": signature, "order": config.order.name, "notation": notation, "seed": seed}
                row |= {"score": scores[-1]}
                contents = {
                    "config.yaml": text.replace("seed: 0\n", f"seed: {seed}\n", 1),
                    "metrics.csv": "epoch,psnr_db\n" + "".join(f"{i},{score}\n" for i, score in enumerate(scores, 1)),
                    "result.json": json.dumps(FIELDS | row, indent=2),
                }
                sums = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in contents.items()}
                contents["SHA256SUMS"] = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
                place = folder / "espcn" / f"{config.order.name}-seed{seed}-{signature[:10]}"
                place.mkdir(parents=True)
                for name, content in contents.items():
                    (place / name).write_text(content, encoding="utf-8")


def tables(settings: Settings, runs: int = 10_000) -> str:
    """Measure `qprune tables` over stored runs, each with config, curve, row and checksums."""
    seconds, cpu_seconds, peak_mb = alone(measure, runs)
    cells = [str(runs), f"{seconds:.2f}", f"{cpu_seconds:.2f}", f"{peak_mb:.0f}"]
    return table(["runs", "seconds", "CPU seconds", "MB"], [cells])


def measure(runs: int) -> tuple[float, float, float]:
    """Return seconds, seconds of CPU and peak MB of a process. Fails unless each run is in a table."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "runs")
        make_runs(results, runs)
        command = [sys.executable, "-m", "qprune.cli.main", "tables", f"results_dir={results}"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        counts: dict[str, int] = {}
        for path in (results / "tables").glob("*.csv"):
            with path.open(encoding="utf-8") as file:
                counts |= {line["label"]: int(line["n"]) for line in csv.DictReader(file) if line["part"] == "ESPCN"}
    if sum(counts.values()) != runs:
        raise RuntimeError(f"{sum(counts.values())} of {runs} runs are in the tables")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the one process that this one has started
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
