"""The sparse form: a network's state in a safetensors file whose size is that of the bits that are counted.

A weight on a grid is a bitmask of its nonzero elements and their values at N bits each; a feature mask is one bit per
entry; the rest is kept as it is, byte plane by byte plane. All tensors of a kind are laid end to end, as the parts
`masks`, `values`, `feature_masks` and one per other type. They follow an index, JSON that says what they are, in one
stream of xz, the tensor `content`: names, metadata and a stream for each took a twentieth of the file of ESPCN.
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
from qprune.export.weights import weights_of

FORMAT = "qprune.sparse.3"
SUFFIX = ".sparse.safetensors"
CONTENT = "content"
IN_THE_OPEN = ("qprune.signature", "qprune.recipe")  # what every reader of safetensors is told; the index holds all
LENGTH = 8  # bytes of the index's length, the lowest first


def pack(values: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Whole numbers of `bits` bits, two's complement, end to end, the lowest bit first."""
    shifts = np.arange(bits)
    planes = (values[:, None] >> shifts) & 1
    return np.packbits(planes.astype(np.uint8).ravel(), bitorder="little")


def unpack(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int64]:
    """What `pack` was given."""
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits).astype(np.int64)
    values: NDArray[np.int64] = (planes << np.arange(bits)).sum(axis=1)
    return values - (planes[:, -1] << bits)


def squeezed(content: bytes) -> Tensor:
    """Bytes, compressed by xz, as a tensor (uint8). The dictionary is as large as what it must hold, for memory."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, len(content))}]
    packed = lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def planes(array: NDArray[Any]) -> bytes:
    """Every element's lowest byte, then every second one, and so on: like stands beside like, and compresses better."""
    return array.ravel().view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def from_planes(content: bytes, kind: str) -> NDArray[Any]:
    """What `planes` was given, flat."""
    return np.frombuffer(content, np.uint8).reshape(np.dtype(kind).itemsize, -1).T.copy().view(kind).ravel()


def sparse_bytes(network: nn.Module, baked: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """The content of the file for `network` and what `Compressor.bake` made of it."""
    weights = {f"{path}.weight": weight for path, weight in weights_of(network).items()}
    index: list[dict[str, Any]] = []
    packed: dict[str, list[NDArray[np.uint8]]] = {}
    plain: dict[str, list[NDArray[Any]]] = {}
    for name, tensor in baked.state_dict().items():
        if tensor.numel() == 0 or name.endswith((".total", ".kept")):
            continue
        entry: dict[str, Any] = {"name": name, "shape": list(tensor.shape)}
        if name in weights:
            weight = weights[name]
            integers = weight.integers.numpy().astype(np.int64).ravel()
            mask = integers != 0
            entry |= {"bits": weight.bits, "nonzero": int(mask.sum()), "decimal": weight.decimal.flatten().tolist()}
            entry["decimal_shape"] = list(weight.decimal.shape)
            packed.setdefault("masks", []).append(np.packbits(mask))
            packed.setdefault("values", []).append(pack(integers[mask], weight.bits))
        elif name.endswith(".mask") and set(tensor.unique().tolist()) <= {0.0, 1.0}:
            entry["mask"] = str(tensor.dtype).removeprefix("torch.")
            packed.setdefault("feature_masks", []).append(np.packbits(tensor.numpy().ravel().astype(bool)))
        else:
            entry["type"] = str(tensor.dtype).removeprefix("torch.")
            plain.setdefault(entry["type"], []).append(tensor.contiguous().numpy().ravel())
        index.append(entry)
    contents = {name: np.concatenate(arrays).tobytes() for name, arrays in packed.items()}
    contents |= {name: planes(np.concatenate(arrays)) for name, arrays in plain.items()}
    sizes = {name: len(content) for name, content in contents.items()}
    told = {"metadata": dict(metadata), "parts": sizes, "tensors": index}
    head = json.dumps(told, separators=(",", ":")).encode()
    content = b"".join([len(head).to_bytes(LENGTH, "little"), head, *contents.values()])
    shown = {key: metadata[key] for key in IN_THE_OPEN if key in metadata}
    return save({CONTENT: squeezed(content)}, metadata={**shown, "format": FORMAT})


def _read(path: Path | str) -> tuple[dict[str, Any], bytes]:
    """The index of a file and the bytes behind it. Raises UserError for another kind of file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path} is no file that qprune export wrote for sparse weights (its format is "
                    f"{metadata.get('format')}, and what can be read {FORMAT})"
                )
            content = lzma.decompress(file.get_tensor(CONTENT).numpy().tobytes())
    except (OSError, SafetensorError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    index: dict[str, Any] = json.loads(content[LENGTH:end])
    return index, content[end:]


def sparse_metadata(path: Path | str) -> dict[str, str]:
    """What the file says of itself: run, recipe, score, options, counted bits. Raises UserError for another kind."""
    metadata: dict[str, str] = _read(path)[0]["metadata"]
    return metadata


def load_sparse(path: Path | str) -> dict[str, Tensor]:
    """The state dict of the baked network, dense, equal to the last bit. Raises UserError for another kind of file.

    What a run observed on its way (`total`, `kept`) is not kept; load it with `strict=False`.
    """
    index, content = _read(path)
    bitwise = ("masks", "values", "feature_masks")
    parts: dict[str, NDArray[Any]] = {}
    start = 0
    for name, size in index["parts"].items():
        parts[name] = from_planes(content[start : start + size], "uint8" if name in bitwise else name)
        start += size
    place = dict.fromkeys(parts, 0)

    def taken(part: str, count: int) -> NDArray[Any]:
        start = place[part]
        place[part] += count
        return parts[part][start : start + count]

    state = {}
    for entry in index["tensors"]:
        size = int(np.prod(entry["shape"], dtype=np.int64))
        if "bits" in entry:
            mask = np.unpackbits(taken("masks", -(-size // 8)), count=size).astype(bool)
            packed = taken("values", -(-entry["nonzero"] * entry["bits"] // 8))
            integers = np.zeros(size, np.float32)
            integers[mask] = unpack(packed, entry["nonzero"], entry["bits"])
            decimal = torch.tensor(entry["decimal"], dtype=torch.int32).view(entry["decimal_shape"])
            value = torch.from_numpy(integers).view(entry["shape"]) * power_of_two(-decimal)
        elif "mask" in entry:
            bits = np.unpackbits(taken("feature_masks", -(-size // 8)), count=size)
            value = torch.from_numpy(bits).to(getattr(torch, entry["mask"])).view(entry["shape"])
        else:
            value = torch.from_numpy(taken(entry["type"], size).copy()).view(entry["shape"])
        state[entry["name"]] = value
    return state
