"""Code that a config names: it runs only if it is qprune's, or the user trusts it."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qprune.errors import TRUST_VARIABLE, UserError

_OWN = ("qprune.tasks",)
_HYDRAS = ("hydra", "hydra_plugins", "logging", "colorlog")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def require_trusted(key: str, target: Any) -> None:
    """Raise UserError unless `target` is a dotted path into a package that may run."""
    if not isinstance(target, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target):
        raise UserError(
            f"{key}={target!r} is not the dotted path of a class; give one such as qprune.tasks.cifar.Cifar, in a "
            "package on the Python path"
        )
    trusted = (*_OWN, *filter(None, os.environ.get(TRUST_VARIABLE, "").replace(" ", "").split(",")))
    if not _is_in(target, trusted):
        package = target.partition(".")[0]
        raise UserError(
            f"{key}={target} is code outside qprune, and a run would execute it; if you trust the package {package}, "
            f"add --trust {package} to the command, or for good: export {TRUST_VARIABLE}={package}"
        )


def refuse_code_of_hydra(section: Any) -> None:
    """Raise UserError where Hydra or logging would call what is not theirs."""
    for key, value in _leaves(section, "hydra"):
        name = key.rpartition(".")[2]
        logs = "_logging." in key
        if (name == "_target_" or (logs and name in ("class", "()"))) and not _is_in(str(value), _HYDRAS):
            require_trusted(key, value)
        if logs and isinstance(value, str) and value.startswith("ext://") and value not in _STREAMS:
            raise UserError(f"{key}={value} names an object of this process; legal: {', '.join(_STREAMS)}")


def _is_in(target: str, packages: Sequence[str]) -> bool:
    return any(target.startswith(f"{package}.") for package in packages)


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}")
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            yield from _leaves(value, path)
    else:
        yield path, node
