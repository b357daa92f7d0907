"""Write a network as ONNX, or a finished run in its sparse form, and verify the file."""

from importlib import import_module
from typing import Any

_HOMES = {
    "export_hls4ml": "hls",
    "export_integers": "integers",
    "export_onnx": "onnx_files",
    "export_run": "files",
    "load_sparse": "sparse",
    "sparse_metadata": "sparse",
    "verify_onnx": "verification",
    "verify_run": "verification",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public function at its first use: only some need the extra `export`."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
