"""Check that AddressSanitizer and UBSan, where they watch, find wrong accesses of kernels."""

import os

import pytest
import torch

from tests.emulation.library import SANITIZER
from tests.emulation.test_head_screened import screened

pytestmark = pytest.mark.skipif(
    SANITIZER != "address", reason="needs AddressSanitizer: make emulate-memory"
)


def gather(emulator):
    emulator.ops.gather_rows([torch.zeros(3, 5)[:, 1:]], torch.tensor([2]))


def prune(emulator):
    emulator.ops.prune_rows(torch.rand(1, 9000), 5000, 0.0, None, None)


def search(emulator):
    values, ones = torch.arange(100.0)[:, None], torch.ones(100, 1).int()
    documents = torch.zeros_like(ones), values, ones[:, 0]
    emulator.ops.sparse_search(None, torch.ones(1, 1), None, *documents, 1, 3)


def pack(emulator):
    """Pack tokens into a piece of memory that others follow."""
    hidden, weight = torch.ones(1, 5, 8).half(), torch.ones(1, 8).half()
    mask = torch.ones(1, 5, dtype=torch.bool)
    options = None, mask, None, 0, 0, False, False
    screened(emulator, torch.zeros(8), hidden, weight, *options)


CHECKS = {
    "search_with_short_lists": (search, "AddressSanitizer: heap-buffer-overflow"),
    "gather_beyond_the_row": (gather, "AddressSanitizer: heap-buffer-overflow"),
    "gather_by_the_widest_access": (gather, "misaligned address"),
    "pack_beyond_the_rows": (pack, "AddressSanitizer: use-after-poison"),
    "prune_beyond_the_buffer": (prune, "out of bounds"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_wrong_access_is_found(capfd, emulator, name):
    check, report = CHECKS[name]
    child = os.fork()  # the report ends the process
    if child == 0:
        with emulator.mistake(name):
            check(emulator)
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0
    assert report in capfd.readouterr().err
