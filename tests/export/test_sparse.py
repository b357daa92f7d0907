"""The sparse form: back to the last bit, and as small as what is counted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qprune.compression.convert import with_plain_weights
from qprune.compression.plan import Plan, Site
from qprune.errors import UserError
from qprune.export.sparse import load_sparse, pack, sparse_bytes, sparse_metadata, unpack
from tests.export.networks import RESIDUAL_PLAN, Residual, compressed


@given(st.integers(2, 16), st.data())
def test_packing_is_undone(bits: int, data: st.DataObject) -> None:
    whole = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    values = np.array(data.draw(st.lists(whole, min_size=1, max_size=40)), dtype=np.int64)
    packed = pack(values, bits)
    assert len(packed) == -(-len(values) * bits // 8)
    assert (unpack(packed, len(values), bits) == values).all()


@pytest.mark.parametrize("bits", [3, 8, 12])
@pytest.mark.parametrize("axis", ["authors", "output", "tensor"])
def test_a_network_comes_back_to_the_last_bit(tmp_path: Path, bits: int, axis: str) -> None:
    compressor = compressed(Residual(), RESIDUAL_PLAN, (1, 3, 8, 8), bits=bits, weight_axis=axis)
    baked = with_plain_weights(compressor.network).eval()
    path = tmp_path / "network.sparse.safetensors"
    path.write_bytes(sparse_bytes(compressor.network, baked, {}))
    state = load_sparse(path)
    for name, tensor in baked.state_dict().items():
        if not name.endswith((".total", ".kept")):
            assert torch.equal(state[name], tensor), name
            assert state[name].dtype == tensor.dtype, name
    fresh = with_plain_weights(compressor.network).eval()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(state, strict=False)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(fresh(x), compressor.network(x))


def test_a_large_weight_takes_the_bits_that_are_counted() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    compressor = compressed(network, Plan((Site("0", "weight", prune=True, quantize=True),)), (1, 256), targets="w")
    size = len(sparse_bytes(network, with_plain_weights(compressor.network), {}))
    counted = 256 * 256 * (1 + 0.5 * 8) / 8  # a bit of the mask, and 8 for every second element
    # the mask is as random as the weights and takes a bit each; bytes that are normally distributed compress by a tenth
    assert 0.85 * counted < size < counted


def test_names_and_metadata_of_a_small_network_are_compressed_with_it(tmp_path: Path) -> None:
    compressor = compressed(Residual(), RESIDUAL_PLAN, (1, 3, 8, 8))
    told = {"qprune.signature": "ab" * 32, "qprune.recipe": "P->Q", "qprune.quantize": '{"bits": 8}' * 40}
    path = tmp_path / "network.sparse.safetensors"
    path.write_bytes(sparse_bytes(compressor.network, with_plain_weights(compressor.network), told))
    assert sparse_metadata(path) == told
    with safe_open(path, "np") as file:
        assert file.metadata() == {k: told[k] for k in ("qprune.signature", "qprune.recipe")} | {
            "format": "qprune.sparse.3"
        }
    bare = len(sparse_bytes(compressor.network, with_plain_weights(compressor.network), {}))
    assert path.stat().st_size < bare + 250  # 440 bytes of options are worth few, in the stream of the rest


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is no file that qprune export wrote for sparse weights"):
        load_sparse(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_sparse(path)
