"""Planes on large pages: the same values, in no more memory, where the system gives such pages."""

import re
from pathlib import Path

import pytest
import torch

from stoicc.codegen.cpu import pages
from stoicc.codegen.cpu.pages import HUGE_PAGE, collapse, on_huge_pages


def huge_bytes(address: int) -> int:
    """Bytes on large pages of the mapping that an address is in, as Linux says."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("elements", [2 * HUGE_PAGE, 2 * HUGE_PAGE + 24, 5 * HUGE_PAGE - 8])
def test_a_plane_of_some_size_is_copied(dtype, elements):
    plane = torch.randint(0, 100, (2, elements // 2)).to(dtype)
    copy = on_huge_pages({"plane": plane})["plane"]
    assert torch.equal(copy, plane)
    assert copy.dtype == dtype
    assert copy.is_contiguous()
    assert copy.data_ptr() != plane.data_ptr()
    assert copy.data_ptr() % HUGE_PAGE == 0


def test_small_arrays_lie_beside_large_ones():
    arrays = {
        "scales": torch.randn(3, 5),
        "codes": torch.randint(0, 100, (2 * HUGE_PAGE + 7,), dtype=torch.uint8),
        "none": torch.empty(0, 16, dtype=torch.int32),
        "columns": torch.arange(100, dtype=torch.int32),
    }
    copies = on_huge_pages(dict(arrays))
    assert list(copies) == list(arrays)
    assert all(torch.equal(copies[name], arrays[name]) for name in arrays)
    assert all(copy.dtype == arrays[name].dtype for name, copy in copies.items())
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values()}) == 1
    starts = [copy.data_ptr() for copy in copies.values() if copy.numel()]
    assert starts == sorted(starts)
    assert all(start % 64 == 0 for start in starts)
    assert starts[-1] - starts[0] <= sum(array.nbytes + 63 for array in arrays.values())


def test_small_arrays_alone_stay_where_they_are():
    arrays = {"one": torch.ones(HUGE_PAGE, dtype=torch.uint8), "other": torch.ones(HUGE_PAGE - 64, dtype=torch.uint8)}
    assert all(copy is arrays[name] for name, copy in on_huge_pages(dict(arrays)).items())


def test_one_array_at_a_time_is_there_twice():
    arrays = {"one": torch.ones(2 * HUGE_PAGE, dtype=torch.uint8), "other": torch.ones(5, dtype=torch.uint8)}
    copies = on_huge_pages(arrays)
    assert len(copies) == 2
    assert not arrays


def test_the_system_is_asked_for_whole_pages_only():
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("the system gives no large pages")
    plane = torch.ones(9 * HUGE_PAGE + 4096, dtype=torch.uint8)
    copy = on_huge_pages({"plane": plane})["plane"]
    if "[madvise]" in enabled.read_text():
        assert huge_bytes(copy.data_ptr()) <= 9 * HUGE_PAGE
    assert huge_bytes(copy.data_ptr()) >= 4 * HUGE_PAGE  # memory may be in pieces


def test_a_plane_moves_where_it_is():
    plane = torch.arange(9 * HUGE_PAGE // 8)
    before, address = plane.clone(), plane.data_ptr()
    if not collapse(plane):
        pytest.skip("the system does not move memory to large pages")
    assert plane.data_ptr() == address
    assert torch.equal(plane, before)
    assert huge_bytes(address) >= 4 * HUGE_PAGE  # the others may have no room


def test_what_is_small_or_not_aligned_is_left_alone(monkeypatch):
    memory = torch.zeros(8 * HUGE_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE + 1
    asked = []

    class Libc:
        @staticmethod
        def madvise(start, length, advice):
            asked.append((start.value, length.value, advice))
            return 0

    monkeypatch.setattr("ctypes.CDLL", lambda name: Libc)
    assert not collapse(memory[: 2 * HUGE_PAGE - 1])
    assert collapse(memory[start : start + 3 * HUGE_PAGE])
    assert asked == [(memory.data_ptr() + start - 1 + HUGE_PAGE, 2 * HUGE_PAGE, 25)]


def test_a_system_without_them_changes_nothing(monkeypatch):
    plane = torch.ones(2 * HUGE_PAGE, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(pages, "_MADVISE", None)
        assert on_huge_pages({"plane": plane})["plane"] is plane
        assert not collapse(plane)
    monkeypatch.setattr(pages, "_MADVISE", 12345)  # EINVAL
    assert on_huge_pages({"plane": plane})["plane"] is plane
