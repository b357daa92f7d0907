"""Write a network as whole numbers: one archive with all that C or RTL is written from, readable by numpy alone.

The archive is an npz file. Its entry `network` is a JSON text: `inputs`, `outputs` and `operations` in order, each with
its name, torch's name of it and its arguments, where {"node": name} is a result and {"tensor": name} an entry of the
archive. A `weight` has integers, bits, fraction bits `decimal` along `axis` (-1: one for all) and the type of fixed
point, a `grid` the same for a feature with its rounding; a `mask` has 0 and 1. Norms and biases are float32.
"""

from __future__ import annotations

import io
import json
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx, nn
from torch.fx.node import map_aggregate

from qprune.atomic_write import write_atomically
from qprune.export.trace import Inputs, arguments, operation, trace, with_custom_operators

FORMAT = "qprune.integers.1"


def export_integers(network: nn.Module, example: Any, path: Path | str) -> None:
    """Write a compressed network as whole numbers.

    Args:
        network: As `compress` left it; it is not changed.
        example: One input, as in `compress`.
        path: The file, `*.npz`.

    Raises:
        UserError: torch cannot trace the network, or it has no operators.
    """
    write_atomically(Path(path), integers_bytes(network, Inputs.of(example), {}))


def integers_bytes(network: nn.Module, inputs: Inputs, metadata: dict[str, str]) -> bytes:
    """Return the archive."""
    traced = trace(with_custom_operators(network), inputs)
    tensors: dict[str, Any] = {}

    def described(value: Any) -> Any:
        """Return an argument as JSON."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensors[str(value.target)] = attrgetter(str(value.target))(traced).detach()
            return {"tensor": str(value.target)}
        if isinstance(value, fx.Node):
            return {"node": value.name}
        return value if isinstance(value, int | float | str | bool | None) else str(value)

    operations, ends = [], {}
    for node in traced.graph.nodes:
        if node.op == "call_function":
            given = arguments(node) or {str(i): value for i, value in enumerate(node.args)}
            entry = {"name": node.name, "operation": operation(node), "arguments": map_aggregate(given, described)}
            if operation(node) in ("weight", "grid"):
                entry["type"] = fixed_type(given["bits"], given["decimal"])
            operations.append(entry)
        elif node.op == "output":
            ends = {"outputs": map_aggregate(node.args[0], described)}
    names = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    network_json = {"format": FORMAT, "metadata": metadata, "inputs": names, **ends, "operations": operations}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    archive = io.BytesIO()
    np.savez_compressed(archive, network=np.array(json.dumps(network_json)), **arrays)
    return archive.getvalue()


def fixed_type(bits: int, decimal: int | list[int]) -> str | list[str]:
    """Return the type fixed<W, I> of N bits, of which d are fraction bits; I = N - d may be negative."""
    if isinstance(decimal, int):
        return f"fixed<{bits},{bits - decimal}>"
    return [f"fixed<{bits},{bits - each}>" for each in decimal]
