"""The sparse form: a safetensors file of about the size of the counted bits.

A weight on a grid is a bitmask of its nonzero elements and their values at N bits each, a feature mask is one bit per
entry, and everything else is stored as it is. Tensors of a kind are concatenated into parts (`masks`, `values`,
`feature_masks`, and one per other type), each byte plane by byte plane. The parts follow a JSON index in one xz stream,
the tensor `content`: one stream each would cost a twentieth of the file of ESPCN.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qprune.compression.fake_quantize import power_of_two
from qprune.errors import UserError
from qprune.export.trace import quantized_weights

FORMAT = "qprune.sparse.3"
SUFFIX = ".sparse.safetensors"
BIT_PARTS = ("masks", "values", "feature_masks")
PLAIN_METADATA = ("qprune.signature", "qprune.recipe")  # readable by any reader of safetensors; the index has all
INDEX_LENGTH = 8  # bytes, the lowest first


def pack(values: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Pack integers at `bits` bits each, two's complement, the lowest bit first."""
    planes = (values[:, None] >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8).ravel(), bitorder="little")


def unpack(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int64]:
    """Return the integers that were packed."""
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits).astype(np.int64)
    values: NDArray[np.int64] = (planes << np.arange(bits)).sum(axis=1)
    return values - (planes[:, -1] << bits)


def sparse_bytes(network: nn.Module, converted: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """Return the file for a compressed network and what `convert` made of it."""
    weights = {f"{path}.weight": weight for path, weight in quantized_weights(network).items()}
    index: list[dict[str, Any]] = []
    parts: dict[str, list[NDArray[Any]]] = {}
    for name, tensor in converted.state_dict().items():
        if tensor.numel() == 0:
            continue
        flat = tensor.contiguous().numpy().ravel()
        entry: dict[str, Any] = {"name": name, "shape": list(tensor.shape)}
        if name in weights:
            weight = weights[name]
            integers = weight.integers.numpy().astype(np.int64).ravel()
            kept = integers != 0
            entry |= {"bits": weight.bits, "nonzero": int(kept.sum()), "decimal": weight.decimal.flatten().tolist()}
            entry["decimal_shape"] = list(weight.decimal.shape)
            parts.setdefault("masks", []).append(np.packbits(kept))
            parts.setdefault("values", []).append(pack(integers[kept], weight.bits))
        elif name.endswith(".mask") and set(np.unique(flat)) <= {0, 1}:
            entry["mask"] = flat.dtype.name
            parts.setdefault("feature_masks", []).append(np.packbits(flat.astype(bool)))
        else:
            entry["type"] = flat.dtype.name
            parts.setdefault(flat.dtype.name, []).append(flat)
        index.append(entry)
    contents = {}
    for name in sorted(parts, key=lambda name: name not in BIT_PARTS):
        array = np.concatenate(parts[name])
        contents[name] = array.view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
    sizes = {name: len(content) for name, content in contents.items()}
    head = json.dumps({"metadata": dict(metadata), "parts": sizes, "tensors": index}, separators=(",", ":")).encode()
    content = b"".join([len(head).to_bytes(INDEX_LENGTH, "little"), head, *contents.values()])
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, len(content))}]
    packed = lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)
    plain = {key: metadata[key] for key in PLAIN_METADATA if key in metadata}
    return save({"content": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}, {**plain, "format": FORMAT})


def _read(path: Path | str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the index and the parts of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found != FORMAT:
                raise UserError(
                    f"{path} is no file that qprune export wrote for sparse weights (its format is {found}, and what "
                    f"can be read {FORMAT})"
                )
            content = lzma.decompress(file.get_tensor("content").numpy().tobytes())
    except (OSError, SafetensorError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    start = INDEX_LENGTH + int.from_bytes(content[:INDEX_LENGTH], "little")
    index: dict[str, Any] = json.loads(content[INDEX_LENGTH:start])
    parts = {}
    for name, size in index["parts"].items():
        dtype = np.dtype("uint8" if name in BIT_PARTS else name)
        planes = np.frombuffer(content[start : start + size], np.uint8).reshape(dtype.itemsize, -1)
        parts[name] = planes.T.copy().view(dtype).ravel()
        start += size
    return index, parts


def sparse_metadata(path: Path | str) -> dict[str, str]:
    """Return what a sparse file says of its run: signature, recipe, score, options.

    Raises:
        UserError: Another kind of file, or one that cannot be read.
    """
    metadata: dict[str, str] = _read(path)[0]["metadata"]
    return metadata


def load_sparse(path: Path | str) -> dict[str, Tensor]:
    """Return the state dict of the converted network, equal in every bit.

    Tensors without elements are not stored: load the state with `strict=False`.

    Raises:
        UserError: Another kind of file, or one that cannot be read.
    """
    index, parts = _read(path)

    def take(part: str, count: int) -> NDArray[Any]:
        taken, parts[part] = parts[part][:count], parts[part][count:]
        return taken

    state = {}
    for entry in index["tensors"]:
        size = int(np.prod(entry["shape"], dtype=np.int64))
        if "bits" in entry:
            kept = np.unpackbits(take("masks", -(-size // 8)), count=size).astype(bool)
            values = take("values", -(-entry["nonzero"] * entry["bits"] // 8))
            integers = np.zeros(size, np.float32)
            integers[kept] = unpack(values, entry["nonzero"], entry["bits"])
            decimal = torch.tensor(entry["decimal"], dtype=torch.int32).view(entry["decimal_shape"])
            value = torch.from_numpy(integers).view(entry["shape"]) * power_of_two(-decimal)
        elif "mask" in entry:
            flags = np.unpackbits(take("feature_masks", -(-size // 8)), count=size).astype(entry["mask"])
            value = torch.from_numpy(flags).view(entry["shape"])
        else:
            value = torch.from_numpy(take(entry["type"], size).copy()).view(entry["shape"])
        state[entry["name"]] = value
    return state
