"""Time and memory of `qprune tables` over folders of made-up runs: python scripts/benchmark_tables.py [RUNS ...]

Each run has what a real one leaves for tables: config, curve, row and the checksums of the three.
"""

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


def measure(folder: Path) -> tuple[float, float, float]:
    """Seconds, seconds of CPU and peak MB of `qprune tables` over these runs. Fails unless each is in a table."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "qprune.cli.main", "tables", f"results_dir={folder}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = set()
    for path in (folder / "tables").glob("*.csv"):
        with path.open(encoding="utf-8") as file:
            found |= {(line["label"], int(line["n"])) for line in csv.DictReader(file) if line["part"] == "ESPCN"}
    made = len(list((folder / "espcn").iterdir()))
    if (counted := sum(dict(found).values())) != made:
        raise SystemExit(f"{counted} of {made} runs are in the tables")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, after.ru_maxrss / 1024


def main() -> None:
    """Print seconds, peak memory and time per run for each number of runs (default: 1250 to 10000, doubling)."""
    print("   runs  seconds  CPU s   MB  ms/run above the smallest")
    smallest: tuple[int, float] | None = None
    for count in map(int, sys.argv[1:] or ("1250", "2500", "5000", "10000")):
        with tempfile.TemporaryDirectory() as folder:
            make_runs(Path(folder, "runs"), count)
            seconds, cpu, peak = measure(Path(folder, "runs"))
        smallest = smallest or (count, seconds)
        more = count - smallest[0]
        slope = f"{1000 * (seconds - smallest[1]) / more:.3f}" if more else "-"
        print(f"{count:7d}  {seconds:7.2f}  {cpu:5.2f}  {peak:3.0f}  {slope}", flush=True)


if __name__ == "__main__":
    main()
