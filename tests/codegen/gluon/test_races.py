"""Barriers, waits and slots one by one: whichever of them a kernel lacks, the emulator finds the race.

Triton adds barriers of its own where it cannot tell slots of the ring apart, so a loop has two of which one would do.
Those that would do without are taken away first; each that is left has to be missed.
"""

import re
from collections.abc import Iterator

import pytest
import torch

from stoicc.codegen.gluon.compile import Compiled, compile_for
from stoicc.codegen.gluon.launch import HAS_WGMMA, GluonConfig
from tests.codegen.gluon.test_emulated import TOLERANCE, error_of
from tests.kernel_classes import Case, KernelClass, make_case
from tests.ptx.program import EmulationError
from tests.ptx.run import emulate

BARRIER, COPIES = re.compile(r"bar\.sync\s+0;"), re.compile(r"cp\.async\.wait_group\s+(\d+);")


class Ring:
    """A kernel of a tile row that turns the ring more than once, compiled, and x for it."""

    def __init__(self, formats: str, block_n: int, config: GluonConfig, columns: int, arch: str = "sm_90") -> None:
        kernel = KernelClass(formats, (64, 64), "bf16", "same", "bias", False, block_n)
        self.case: Case = make_case(kernel, (64, columns), empty=0.0)
        self.compiled: Compiled = compile_for(self.case.module, torch.bfloat16, block_n, arch, config)
        self.x = torch.randn(block_n - 3, columns).bfloat16()

    @property
    def ptx(self) -> str:
        return self.compiled.kernels[0].ptx

    def fault_of(self, ptx: str) -> str | None:
        """What is wrong with the kernel as this text says, None where nothing is."""
        change = None if ptx == self.ptx else lambda _: ptx
        try:
            error = error_of(emulate(self.compiled, self.x, self.case.pools, change), self.case, self.x)
        except EmulationError as fault:
            return str(fault)
        return None if error < TOLERANCE["bf16"] else "y is wrong"


@pytest.fixture(scope="module")
def mosaic() -> Ring:
    """Four loops by `mma`; the last tile is in the slot that sums change places in."""
    return Ring("mosaic_64", 16, GluonConfig(16, 4, 4), 1016, "sm_80")


@pytest.fixture(scope="module")
def warpgroup() -> Ring:
    """One loop by `wgmma`."""
    return Ring("nv24", 64, GluonConfig(64, 4, 4, True), 456)


def without(ptx: str, pattern: re.Pattern[str], index: int) -> str:
    found = list(pattern.finditer(ptx))[index]
    return ptx[: found.start()] + ptx[found.end() :]


def faults_without_barriers(ring: Ring) -> Iterator[str]:
    """What each barrier's absence does, once those that would do without have gone."""
    ptx, at = ring.ptx, 0
    while at < len(BARRIER.findall(ptx)):
        less = without(ptx, BARRIER, at)
        fault = ring.fault_of(less)
        if fault is None:
            ptx = less
        else:
            yield fault
            at += 1


def test_every_barrier_of_the_ring_is_missed(mosaic: Ring) -> None:
    """One for each of four loops, one before the sums change places and one while they do."""
    assert mosaic.fault_of(mosaic.ptx) is None
    faults = list(faults_without_barriers(mosaic))
    assert len(faults) == 6
    assert all("another warp has" in fault for fault in faults), faults


def test_every_wait_for_copies_is_missed(mosaic: Ring) -> None:
    waits = list(COPIES.finditer(mosaic.ptx))
    assert [found[1] for found in waits] == ["2"] * 4 + ["0"]
    for found in waits[:4]:
        late = f"{mosaic.ptx[: found.start()]}cp.async.wait_group 3;{mosaic.ptx[found.end() :]}"
        assert mosaic.fault_of(late) is not None
    fault = mosaic.fault_of(without(mosaic.ptx, COPIES, 4))
    assert fault is None or "on their way" in fault  # the last tile has been waited for


def test_every_group_of_copies_is_missed(mosaic: Ring) -> None:
    commits = re.compile(r"cp\.async\.commit_group;")
    for index in range(len(commits.findall(mosaic.ptx))):
        assert mosaic.fault_of(without(mosaic.ptx, commits, index)) is not None, index


@pytest.mark.skipif(not HAS_WGMMA, reason="wgmma needs triton 3.9")
def test_every_barrier_of_warpgroups_is_missed(warpgroup: Ring) -> None:
    assert warpgroup.fault_of(warpgroup.ptx) is None
    faults = list(faults_without_barriers(warpgroup))
    assert len(faults) >= 3
    assert all("another warp has" in fault for fault in faults), faults


@pytest.mark.parametrize("ahead", ["STAGES", "STAGES - 2"])
def test_copies_that_are_not_as_far_ahead_as_they_should_be_are_caught(
    ahead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the slot that is being read, and with waits that count one group too many."""
    monkeypatch.setattr("stoicc.codegen.gluon.ring.ahead", lambda shape: ahead)
    monkeypatch.setattr("stoicc.codegen.gluon.emit.ahead", lambda shape: ahead)
    ring = Ring("nv24", 16, GluonConfig(16, 4, 4), 1016, "sm_80")
    assert ring.fault_of(ring.ptx) is not None
