"""Commands as a shell starts them."""

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def command(*words: str, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Carry out a command in this folder, with the `qprune` of this environment."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )
