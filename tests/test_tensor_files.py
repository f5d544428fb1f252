"""Files that splade_fast writes itself have the bytes that safetensors writes."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from splade_fast._tensor_files import DTYPES, map_tensors, write_tensors


def draw(shape, dtype):
    size = torch.empty(shape, dtype=dtype).nbytes
    numbers = torch.randint(2, (size,), dtype=torch.uint8)  # 0 and 1 are bytes of every dtype
    return numbers.view(dtype).view(shape)


TENSORS = {
    **{f"one {dtype}": draw((3, 8), dtype) for dtype in DTYPES.values()},
    **{f"an {name}": draw((1,), dtype) for name, dtype in DTYPES.items()},
    "empty": torch.empty(0, 5),
    "\u00e4 scalar": torch.tensor(2.0),
}


@pytest.mark.parametrize("metadata", [None, {"format": '{"version": "\u00e4"}'}])
def test_the_same_bytes_as_safetensors(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "expected", metadata)
    write_tensors(tmp_path / "written", TENSORS, metadata)
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}
    mapped = map_tensors(tmp_path / "mapped", shapes, metadata)
    for name, tensor in TENSORS.items():
        assert not mapped[name].view(torch.uint8).any() if tensor.dim() else mapped[name] == 0
        mapped[name].copy_(tensor)
    del mapped
    expected = (tmp_path / "expected").read_bytes()
    assert (tmp_path / "written").read_bytes() == expected
    assert (tmp_path / "mapped").read_bytes() == expected


def test_no_tensors(tmp_path):
    write_tensors(tmp_path / "written", {})
    assert load_file(tmp_path / "written") == {}


def test_a_transposed_tensor(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).t()
    write_tensors(tmp_path / "written", {"weight": tensor})
    assert torch.equal(load_file(tmp_path / "written")["weight"], tensor)


def test_a_disk_without_room_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def reserve(*_):
        pytest.fail("the disk is filled")

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    disk = os.statvfs(tmp_path)
    shape = (torch.uint8, (disk.f_blocks * disk.f_frsize,))
    with pytest.raises(OSError, match="No space left"):
        map_tensors(tmp_path / "mapped", {"weight": shape})
