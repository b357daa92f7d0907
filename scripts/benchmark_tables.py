"""Time and memory of `qprune tables` over folders of made-up rows: python scripts/benchmark_tables.py [ROWS ...]"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIELDS = {
    "schema_version": 1,
    "task": "espcn",
    "order": "baseline",
    "notation": "Baseline",
    "metric": "psnr_db",
    "score": 30.0,
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


def main() -> None:
    """Print seconds, peak memory and time per row for each number of rows (default: 1250 to 10000, doubling)."""
    print("   rows  seconds   MB  ms/row above the smallest")
    smallest: tuple[int, float] | None = None
    for count in map(int, sys.argv[1:] or ("1250", "2500", "5000", "10000")):
        with tempfile.TemporaryDirectory() as folder:
            runs = Path(folder, "runs")
            for i in range(count):
                place = runs / "espcn" / f"run{i}"
                place.mkdir(parents=True)
                row = FIELDS | {"signature": f"{i:064x}", "seed": i % 200}
                (place / "result.json").write_text(json.dumps(row), encoding="utf-8")
            command = [sys.executable, "-m", "qprune.cli", "tables", *"123456", f"results_dir={runs}"]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        smallest = smallest or (count, seconds)
        more = count - smallest[0]
        slope = f"{1000 * (seconds - smallest[1]) / more:.3f}" if more else "-"
        print(f"{count:7d}  {seconds:7.2f}  {peak:3.0f}  {slope}", flush=True)


if __name__ == "__main__":
    main()
