"""Write a finished run as ONNX or in sparse form, and verify the file."""

from importlib import import_module
from typing import Any

_HOMES = {"export_run": "files", "verify_run": "verification", "load_sparse": "sparse", "sparse_metadata": "sparse"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public function at its first use: only some need the extra `export`."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
